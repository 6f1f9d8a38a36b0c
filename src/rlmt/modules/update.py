"""The update of the policy on one rollout batch: micro-batches, gradients and what is known of them afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlmt.algorithms import Algorithm
from rlmt.distributed.collectives import all_gather_object, all_gather_tensor, clip_gradients, rank, sum_gradients
from rlmt.distributed.fsdp2 import pad_with_no_ops
from rlmt.models.adapters import trainable_parameters
from rlmt.models.critic import Critic
from rlmt.models.logprobs import eval_mode, token_logprobs
from rlmt.models.micro_batch import MicroBatch, micro_batches, no_op_micro_batch, shares_prompts
from rlmt.modules.metrics import UpdateMetrics
from rlmt.types import Experience, RolloutBatch, TokenBatch


@dataclass(frozen=True)
class Step:
    """A gradient is in place; `problem` says in words why it must not be used, if it must not."""

    problem: str | None


@torch.no_grad()
def compute_logprobs(
    model: PreTrainedModel,
    rollouts: RolloutBatch,
    budget: int,
    device: torch.device,
    temperature: float | None = None,
    samples: Sequence[int] | None = None,
) -> Tensor:
    """Log-probs of sampled tokens under a model, without gradients.

    Args:
        model: a policy.
        rollouts: the samples.
        budget: tokens, padding included, in one forward.
        device: the model's.
        temperature: None is the sampling temperature.
        samples: which are wanted; None is all.

    Returns:
        [T] float32, NaN for tokens of samples that are not wanted.
    """
    at = rollouts.sampling.temperature if temperature is None else temperature
    return _for_all(rollouts, budget, model, device, lambda batch: token_logprobs(model, batch, at).logprobs, samples)


@torch.no_grad()
def compute_values(critic: Critic, rollouts: RolloutBatch, budget: int, device: torch.device) -> Tensor:
    """The critic's values of all states in which a token was sampled, without gradients: [T] float32."""
    return _for_all(rollouts, budget, critic.backbone, device, critic)


def _for_all(
    rollouts: RolloutBatch,
    budget: int,
    model: PreTrainedModel,
    device: torch.device,
    per_token: Callable[[MicroBatch], Tensor],
    samples: Sequence[int] | None = None,
) -> Tensor:
    starts = _starts(torch.tensor(rollouts.lengths))
    out = torch.full((sum(rollouts.lengths),), math.nan, dtype=torch.float32, device=device)
    wanted = range(len(rollouts)) if samples is None else samples
    with eval_mode(model):  # no dropout, and no layer is checkpointed where nothing goes backward
        batches = micro_batches(rollouts, wanted, budget, shares_prompts(model), device)
        for batch in pad_with_no_ops(batches, model, no_op_micro_batch(device)):
            values = per_token(batch)
            if batch.samples:
                out[_positions(batch.samples, starts, rollouts.lengths).to(device)] = values
    return out


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
        self._seen = UpdateMetrics()

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
        self._seen = UpdateMetrics()
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
        starts = _starts(experience.lengths.cpu())
        if len(part):  # a rank may have no sample, and a step all the same
            weights[_positions(part.tolist(), starts, rollouts.lengths).to(device)] = shares
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
            where = _positions(batch.samples, starts, rollouts.lengths).to(device)
            tokens = _tokens(experience, batch, where, weights)
            if trained is not None:
                outputs = token_logprobs(trained, batch, temperature)
                loss, metrics = self.algorithm.loss(tokens, outputs)
                backward(loss)
                total[0] += loss.detach()
                if drawn_from and not rollouts.off_policy and temperature == sampled_at:
                    now = outputs.logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
                    metrics |= _mismatch(now, tokens.engine_logprobs)
                self._seen.update(metrics)
            if critic is not None:
                with critic.active_adapter():
                    values = critic(batch, head_only=trained is None and critic.moves_policy)
                    loss, metrics = self.algorithm.value_loss(tokens, values)
                    backward(loss)
                self._seen.update(metrics)
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
            self._seen.update_step({f"{prefix}/loss": loss, f"{prefix}/grad_norm": norm})
        self._seen.update_step({"policy/skipped": float(problem is not None)})
        return Step(problem)

    def metrics(self) -> dict[str, float]:
        """What was seen in the steps of the last rollout batch, under final names."""
        return self._seen.compute()


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


def _starts(lengths: Tensor) -> Tensor:
    """Where each sample's tokens begin when all lie end to end: [B] int64."""
    return lengths.cumsum(0) - lengths


def _positions(samples: list[int], starts: Tensor, lengths: list[int]) -> Tensor:
    """Positions in the flat token tensors of the given samples, samples in the given order: int64."""
    return torch.cat([torch.arange(int(starts[i]), int(starts[i]) + lengths[i]) for i in samples])
