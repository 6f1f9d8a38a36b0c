"""The update of the policy on one rollout batch: micro-batches, gradients and what is known of them afterwards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlmt.algorithms import Algorithm
from rlmt.distributed.collectives import all_gather_object, all_gather_tensor, rank
from rlmt.distributed.fsdp2 import pad_with_no_ops
from rlmt.distributed.gradients import clip_gradients, sum_gradients
from rlmt.models.adapters import trainable_parameters
from rlmt.models.critic import Critic
from rlmt.models.logprobs import token_logprobs
from rlmt.models.micro_batch import (
    MicroBatch,
    micro_batches,
    no_op_micro_batch,
    shares_prompts,
    token_offsets,
    token_positions,
)
from rlmt.types import Experience, RolloutBatch, TokenBatch


@dataclass(frozen=True)
class Step:
    """A gradient is in place; `problem` says in words why it must not be used, if it must not."""

    problem: str | None


class PolicyUpdate:
    """Computes the gradients of an objective, one optimizer step at a time.

    The gradient does not depend on how a step is cut into micro-batches or spread over ranks: each token carries its
    share of the whole step's loss from the start, and gradients are summed. Samples that take no part in the loss are
    not computed.

    Args:
        algorithm: the objective.
        tokens_per_micro_batch: tokens, padding included, in one forward and backward.
        max_grad_norm: the gradient is clipped to this norm, the policy's and the critic's each on its own.
    """

    def __init__(self, algorithm: Algorithm, tokens_per_micro_batch: int, max_grad_norm: float) -> None:
        self.algorithm = algorithm
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.max_grad_norm = max_grad_norm
        self._seen = _Averages()

    def steps(
        self,
        policy: PreTrainedModel,
        experience: Experience,
        seed: int,
        backward: Callable[[Tensor], None],
        critic: Critic | None = None,
        critic_only: Callable[[], bool] = lambda: False,
    ) -> Iterator[Step]:
        """Yields each time a clipped gradient is ready; the caller steps the optimizer and clears the gradient.

        Args:
            policy: the model to train.
            experience: prepared by the objective.
            seed: of the order of samples when there are several minibatches.
            backward: called with each micro-batch's loss.
            critic: the critic to train beside it, for objectives that want one.
            critic_only: whether the step about to be taken leaves the policy alone; asked before each.
        """
        self._seen = _Averages()
        order = torch.Generator().manual_seed(seed)
        samples = len(experience.rollouts)
        for epoch in range(self.algorithm.update_epochs):
            parts = [torch.arange(samples)]
            if self.algorithm.minibatches > 1:  # of whole groups, so that samples of a prompt stay together
                size = experience.rollouts.group_size
                groups = torch.arange(samples).view(samples // size, size)
                mixed = groups[torch.randperm(len(groups), generator=order)]
                parts = [part.flatten().sort().values for part in mixed.tensor_split(self.algorithm.minibatches)]
                # Fewer groups than minibatches leave the last ones empty; every rank takes as many steps as the others.
                parts = parts[: max(all_gather_object(len(groups)))]
            for number, part in enumerate(parts):
                # The engine drew from these weights: what is measured against it are log-probs from before any step.
                drawn_from = epoch == 0 and (number == 0 or experience.old_logprobs is not None)
                trained = None if critic_only() else policy
                losses = self._accumulate(trained, critic, policy, experience, part, backward, drawn_from)
                yield self._close(trained, critic, losses)

    def _accumulate(
        self,
        trained: PreTrainedModel | None,
        critic: Critic | None,
        policy: PreTrainedModel,
        experience: Experience,
        part: Tensor,
        backward: Callable[[Tensor], None],
        drawn_from: bool,
    ) -> Tensor:
        rollouts, device = experience.rollouts, experience.lengths.device
        lengths = experience.lengths[part.to(device)]
        mask = _taking_part(experience)[part.to(device)]
        shares = self._shares(lengths, mask, rollouts.sampling.max_new_tokens)
        weights = torch.zeros_like(experience.engine_logprobs)
        starts = token_offsets(experience.lengths.cpu())
        if len(part):  # a rank may have no sample, and a step all the same
            weights[token_positions(part.tolist(), starts, rollouts.lengths).to(device)] = shares
        samples, together = part[mask.cpu()].tolist(), 1
        if experience.pairs is not None:
            inside = torch.isin(experience.pairs[:, 0].cpu(), part)
            samples, together = experience.pairs[inside].flatten().tolist(), 2
        total = torch.zeros(2, dtype=torch.float32, device=device)  # of the policy, of the critic
        budget, share = self.tokens_per_micro_batch, shares_prompts(policy)
        sampled_at = rollouts.sampling.temperature
        temperature = self.algorithm.logprob_temperature or sampled_at
        batches = micro_batches(rollouts, samples, budget, share, device, together)
        for batch in pad_with_no_ops(batches, policy, no_op_micro_batch(device)):
            if not batch.samples:
                self._keep_step(trained, critic, batch, temperature, backward)
                continue
            where = token_positions(batch.samples, starts, rollouts.lengths).to(device)
            tokens = _tokens(experience, batch, where, weights)
            if trained is not None:
                outputs = token_logprobs(trained, batch, temperature)
                loss, metrics = self.algorithm.loss(tokens, outputs)
                backward(loss)
                total[0] += loss.detach()
                if drawn_from and not rollouts.off_policy and temperature == sampled_at:
                    now = outputs.logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
                    metrics |= _mismatch(now, tokens.engine_logprobs)
                self._seen.add(metrics)
            if critic is not None:
                with critic.active_adapter():
                    values = critic(batch, head_only=trained is None and critic.moves_policy)
                    loss, metrics = self.algorithm.value_loss(tokens, values)
                    backward(loss)
                self._seen.add(metrics)
                total[1] += loss.detach()
        return total

    @staticmethod
    def _keep_step(
        trained: PreTrainedModel | None,
        critic: Critic | None,
        batch: MicroBatch,
        temperature: float,
        backward: Callable[[Tensor], None],
    ) -> None:
        """Runs what another rank runs at this time, and adds nothing to the gradient."""
        if trained is not None:
            backward(0 * token_logprobs(trained, batch, temperature).logprobs.sum())
        if critic is not None:
            backward(0 * critic(batch, head_only=trained is None and critic.moves_policy).sum())

    def _shares(self, lengths: Tensor, mask: Tensor, max_new_tokens: int) -> Tensor:
        """What each token of this rank weighs in the loss of the step, which is one over the samples of all ranks."""
        before = all_gather_object(len(lengths))[: rank()]
        everywhere = all_gather_tensor(lengths)
        weights = self.algorithm.token_weights(everywhere, all_gather_tensor(mask), max_new_tokens)
        first = int(everywhere[: sum(before)].sum())
        return weights[first : first + int(lengths.sum())]

    def _close(self, trained: PreTrainedModel | None, critic: Critic | None, losses: Tensor) -> Step:
        policy_loss, value_loss = (sum(parts) for parts in zip(*all_gather_object(losses.tolist()), strict=True))
        problem = None
        for model, prefix, loss in ((trained, "policy", policy_loss), (critic, "critic", value_loss)):
            if model is None:
                continue
            parameters = trainable_parameters(model)
            sum_gradients(parameters)
            norm = clip_gradients(parameters, self.max_grad_norm)
            if not math.isfinite(loss):
                problem = f"the {prefix}'s loss is {loss}"
            elif not math.isfinite(norm):
                problem = f"the norm of the {prefix}'s gradient is {norm}"
            self._seen.add_step({f"{prefix}/loss": loss, f"{prefix}/grad_norm": norm})
        self._seen.add_step({"policy/skipped": float(problem is not None)})
        return Step(problem)

    def metrics(self) -> dict[str, float]:
        """What was seen in the steps of the last rollout batch, under final names."""
        return self._seen.result()


def has_no_learning_signal(experience: Experience, critic: Critic | None) -> bool:
    """Whether no sample takes part in the loss, alone or in a pair, or none of those that do has an advantage but 0.

    A step on such a batch would follow the KL penalty, the entropy bonus, weight decay and the optimizer's momentum
    alone, so none is taken; but a critic learns from any sample.
    """
    part, advantages = _taking_part(experience), experience.advantages
    if advantages is None or critic is not None:
        return not bool(part.any())
    if len(advantages) != len(part):
        part = part.repeat_interleave(experience.lengths)
    return not bool((advantages[part] != 0).any())


def _taking_part(experience: Experience) -> Tensor:
    """[B] bool: the samples that take part in the loss."""
    if experience.pairs is not None:
        taking_part = torch.zeros_like(experience.lengths, dtype=torch.bool)
        taking_part[experience.pairs.flatten()] = True
        return taking_part
    return torch.ones_like(experience.lengths, dtype=torch.bool) if experience.mask is None else experience.mask


def _tokens(experience: Experience, batch: MicroBatch, where: Tensor, weights: Tensor) -> TokenBatch:
    lengths = experience.lengths[batch.samples]

    def here(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[where]

    advantages = experience.advantages
    if advantages is not None and len(advantages) == len(experience.rollouts):
        advantages = advantages.repeat_interleave(experience.lengths)
    return TokenBatch(
        sample=torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths),
        lengths=lengths,
        advantages=here(advantages),
        old_logprobs=here(experience.old_logprobs),
        ref_logprobs=here(experience.ref_logprobs),
        engine_logprobs=experience.engine_logprobs[where],
        weights=weights[where],
        off_policy=experience.rollouts.off_policy,
        values=here(experience.values),
        returns=here(experience.returns),
    )


def _mismatch(logprobs: Tensor, engine_logprobs: Tensor) -> dict[str, Tensor]:
    """How far the engine that sampled is from the trainer: KL(engine ‖ trainer) by k3, and the largest gap in nats."""
    gap = logprobs - engine_logprobs
    return {"engine/mismatch_kl": gap.exp() - 1 - gap, "engine/mismatch_max": gap.abs()}


class _Averages:
    """Values averaged over tokens, samples or pairs of all steps, `_max` ones maximised; per-step values over steps."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._steps: dict[str, list[float]] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds a micro-batch's one-dimensional values; kept on their device, since reading each would wait for it."""
        for name, value in values.items():
            if name.endswith("_max"):
                self._sums[name] = torch.maximum(self._sums.get(name, value.max()), value.max())
            else:
                self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.sum()
                self._tokens[name] = self._tokens.get(name, 0) + value.numel()

    def add_step(self, values: dict[str, float]) -> None:
        """Adds scalars of one optimizer step."""
        for name, value in values.items():
            self._steps.setdefault(name, []).append(value)

    def result(self) -> dict[str, float]:
        """All means and maxima, over the tokens, samples or pairs of all ranks."""
        ranks = all_gather_object(
            {name: (float(total), self._tokens.get(name, 0)) for name, total in self._sums.items()}
        )
        merged: dict[str, float] = {}
        for name in dict.fromkeys(name for seen in ranks for name in seen):
            totals, counts = zip(*(seen[name] for seen in ranks if name in seen), strict=True)
            merged[name] = max(totals) if name.endswith("_max") else sum(totals) / sum(counts)
        return merged | {name: sum(values) / len(values) for name, values in self._steps.items()}


def step_timings(batch: RolloutBatch, start: float, scored: float) -> dict[str, float]:
    """Which weights drew a batch, and the seconds of each phase of the step that ends now."""
    seconds = batch.seconds | {"reward": scored - start, "update": time.perf_counter() - scored}
    version = {"engine/weight_version": float(batch.weight_version)}
    if batch.lag is not None:
        version["engine/weight_lag"] = float(batch.lag)
    return version | {f"time/{phase}_s": spent for phase, spent in seconds.items()}
