"""The gradients of the policy on one rollout batch, from micro-batches, and metrics about them.

`RLMTModule._update_policy` steps the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlmt.algorithms import Algorithm
from rlmt.annotations import PreTrainedModel
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
from rlmt.models.rows import packs_rows
from rlmt.modules.metrics import UpdateMetrics, with_effective_sample_size
from rlmt.progress import track
from rlmt.types import Experience, TokenBatch


@dataclass(frozen=True)
class Step:
    """An optimizer step whose gradient is ready."""

    problem: str | None
    """Why the gradient must not be used; None if it is finite."""


class PolicyUpdate:
    """Computes the gradients of an objective, one optimizer step at a time.

    The gradient does not depend on micro-batches or ranks: each token has its weight in the loss of the whole step, and
    gradients are summed. Samples that take no part in the loss are not computed.

    Args:
        algorithm: The objective.
        tokens_per_micro_batch: Tokens, padding included, in one forward and backward pass.
        max_grad_norm: The gradient is clipped to this norm, the policy's and the critic's separately.
    """

    def __init__(self, algorithm: Algorithm, tokens_per_micro_batch: int, max_grad_norm: float) -> None:
        self.algorithm = algorithm
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.max_grad_norm = max_grad_norm
        self._metrics = UpdateMetrics()

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
            policy: The model to train.
            experience: Samples, prepared by the objective.
            seed: Seed of the order of samples if there are several minibatches.
            backward: Called with the loss of each micro-batch.
            critic: The critic to train, for objectives with one.
            critic_only: Whether the next step leaves the policy unchanged; called before each step.
        """
        self._metrics = UpdateMetrics()
        order = torch.Generator().manual_seed(seed)
        samples = len(experience.rollouts)
        for epoch in range(self.algorithm.update_epochs):
            parts = [torch.arange(samples)]
            if self.algorithm.minibatches > 1:  # of whole groups, so that samples of a prompt stay together
                size = experience.rollouts.group_size
                groups = torch.arange(samples).view(samples // size, size)
                mixed = groups[torch.randperm(len(groups), generator=order)]
                parts = [part.flatten().sort().values for part in mixed.tensor_split(self.algorithm.minibatches)]
                # With fewer groups than minibatches the last ones are empty; every rank takes equally many steps.
                parts = parts[: max(all_gather_object(len(groups)))]
            for number, part in enumerate(parts):
                # The engine sampled with the weights from before any step, so its log-probs are compared with those.
                compare_engine = epoch == 0 and (number == 0 or experience.old_logprobs is not None)
                trained = None if critic_only() else policy
                losses = self._accumulate(trained, critic, policy, experience, part, backward, compare_engine)
                yield self._finish(trained, critic, losses)

    def metrics(self) -> dict[str, float]:
        """Metrics of the steps on the last rollout batch, under their final names. All ranks have to call it."""
        return with_effective_sample_size(self._metrics.compute())

    def _accumulate(
        self,
        trained: PreTrainedModel | None,
        critic: Critic | None,
        policy: PreTrainedModel,
        experience: Experience,
        part: Tensor,
        backward: Callable[[Tensor], None],
        compare_engine: bool,
    ) -> Tensor:
        """Adds the gradients of a minibatch on this rank; returns the losses of policy and critic, [2]."""
        rollouts, device = experience.rollouts, experience.lengths.device
        offsets = token_offsets(experience.lengths.cpu())
        weights = self._token_weights(experience, part, offsets)
        samples, unit = part[_takes_part(experience)[part.to(device)].cpu()].tolist(), 1
        if experience.pairs is not None:
            inside = torch.isin(experience.pairs[:, 0].cpu(), part)
            samples, unit = experience.pairs[inside].flatten().tolist(), 2
        losses = torch.zeros(2, dtype=torch.float32, device=device)
        temperature = self.algorithm.logprob_temperature or rollouts.sampling.temperature
        compare_engine &= not rollouts.off_policy and temperature == rollouts.sampling.temperature
        share, packed = shares_prompts(policy), packs_rows(policy)
        batches = micro_batches(rollouts, samples, self.tokens_per_micro_batch, share, device, unit, packed)
        for batch in track("update", pad_with_no_ops(batches, policy, no_op_micro_batch(device))):
            if not batch.samples:
                self._run_no_op(trained, critic, batch, temperature, backward)
                continue
            positions = token_positions(batch.samples, offsets, rollouts.lengths).to(device)
            tokens = _token_batch(experience, batch, positions, weights)
            if trained is not None:
                losses[0] += self._policy_backward(trained, batch, tokens, temperature, backward, compare_engine)
            if critic is not None:
                losses[1] += self._critic_backward(critic, batch, tokens, backward, trained is None)
        return losses

    def _policy_backward(
        self,
        policy: PreTrainedModel,
        batch: MicroBatch,
        tokens: TokenBatch,
        temperature: float,
        backward: Callable[[Tensor], None],
        compare_engine: bool,
    ) -> Tensor:
        outputs = token_logprobs(policy, batch, temperature)
        loss, metrics = self.algorithm.loss(tokens, outputs)
        backward(loss)
        if compare_engine:
            logprobs = outputs.logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
            metrics |= _mismatch(logprobs, tokens.engine_logprobs)
        self._metrics.update(metrics)
        return loss.detach()

    def _critic_backward(
        self,
        critic: Critic,
        batch: MicroBatch,
        tokens: TokenBatch,
        backward: Callable[[Tensor], None],
        critic_only: bool,
    ) -> Tensor:
        with critic.active_adapter():
            values = critic(batch, head_only=critic_only and critic.updates_policy)
            loss, metrics = self.algorithm.value_loss(tokens, values)
            backward(loss)
        self._metrics.update(metrics)
        return loss.detach()

    @staticmethod
    def _run_no_op(
        trained: PreTrainedModel | None,
        critic: Critic | None,
        batch: MicroBatch,
        temperature: float,
        backward: Callable[[Tensor], None],
    ) -> None:
        """Runs a no-op micro-batch, which keeps FSDP ranks in lockstep and adds nothing to the gradient."""
        if trained is not None:
            backward(0 * token_logprobs(trained, batch, temperature).logprobs.sum())
        if critic is not None:
            backward(0 * critic(batch, head_only=trained is None and critic.updates_policy).sum())

    def _token_weights(self, experience: Experience, part: Tensor, offsets: Tensor) -> Tensor:
        """[T] the weight of each token in the loss of a step over the samples `part` of all ranks; 0 for others."""
        rollouts, device = experience.rollouts, experience.lengths.device
        lengths, mask = experience.lengths[part.to(device)], _takes_part(experience)[part.to(device)]
        samples_before = sum(all_gather_object(len(lengths))[: rank()])
        all_lengths = all_gather_tensor(lengths)
        max_new_tokens = rollouts.sampling.max_new_tokens
        all_weights = self.algorithm.token_weights(all_lengths, all_gather_tensor(mask), max_new_tokens)
        first = int(all_lengths[:samples_before].sum())
        weights = torch.zeros_like(experience.engine_logprobs)
        if len(part):  # a rank can have no sample, and takes the step all the same
            own = all_weights[first : first + int(lengths.sum())]
            weights[token_positions(part.tolist(), offsets, rollouts.lengths).to(device)] = own
        return weights

    def _finish(self, trained: PreTrainedModel | None, critic: Critic | None, losses: Tensor) -> Step:
        """Sums gradients over ranks, clips them, and checks that they are finite."""
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
            self._metrics.update_step({f"{prefix}/loss": loss, f"{prefix}/grad_norm": norm})
        self._metrics.update_step({"policy/skipped": float(problem is not None)})
        return Step(problem)


def has_no_learning_signal(experience: Experience, critic: Critic | None) -> bool:
    """True if every sample is masked or every advantage is zero.

    A step on such a batch would follow the KL penalty, the entropy bonus, weight decay and the optimizer's momentum
    only, so none is taken. A critic learns from any sample.
    """
    mask, advantages = _takes_part(experience), experience.advantages
    if advantages is None or critic is not None:
        return not bool(mask.any())
    if len(advantages) != len(mask):
        mask = mask.repeat_interleave(experience.lengths)
    return not bool((advantages[mask] != 0).any())


def _takes_part(experience: Experience) -> Tensor:
    """[B] bool: the samples that take part in the loss."""
    if experience.pairs is not None:
        takes_part = torch.zeros_like(experience.lengths, dtype=torch.bool)
        takes_part[experience.pairs.flatten()] = True
        return takes_part
    return torch.ones_like(experience.lengths, dtype=torch.bool) if experience.mask is None else experience.mask


def _token_batch(experience: Experience, batch: MicroBatch, positions: Tensor, weights: Tensor) -> TokenBatch:
    lengths = experience.lengths[batch.samples]

    def take(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[positions]

    advantages = experience.advantages
    if advantages is not None and len(advantages) == len(experience.rollouts):
        advantages = advantages.repeat_interleave(experience.lengths)
    return TokenBatch(
        sample=torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths),
        lengths=lengths,
        advantages=take(advantages),
        old_logprobs=take(experience.old_logprobs),
        ref_logprobs=take(experience.ref_logprobs),
        engine_logprobs=experience.engine_logprobs[positions],
        weights=weights[positions],
        off_policy=experience.rollouts.off_policy or experience.rollouts.rounded,
        values=take(experience.values),
        returns=take(experience.returns),
    )


def _mismatch(logprobs: Tensor, engine_logprobs: Tensor) -> dict[str, Tensor]:
    """Difference of engine and trainer: KL(engine ‖ trainer) by the k3 estimator, and the largest gap in nats."""
    gap = logprobs - engine_logprobs
    return {"engine/mismatch_kl": gap.exp() - 1 - gap, "engine/mismatch_max": gap.abs()}
