"""The update of the policy on one rollout batch: micro-batches, gradients and what is known of them afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlmt.algorithms import Algorithm
from rlmt.models.logprobs import token_logprobs
from rlmt.models.micro_batch import MicroBatch, micro_batches, shares_prompts
from rlmt.types import Experience, RolloutBatch, TokenBatch


@dataclass(frozen=True)
class Step:
    """A gradient is in place; `problem` says in words why it must not be used, if it must not."""

    problem: str | None


@torch.no_grad()
def first_pass(model: PreTrainedModel, rollouts: RolloutBatch, budget: int, device: torch.device) -> Tensor:
    """Log-probs of all sampled tokens under a model, without gradients: [T] float32."""
    starts = _starts(torch.tensor(rollouts.lengths))
    out = torch.empty(sum(rollouts.lengths), dtype=torch.float32, device=device)
    for batch in micro_batches(rollouts, range(len(rollouts)), budget, shares_prompts(model), device):
        where = _positions(batch.samples, starts, rollouts.lengths).to(device)
        out[where] = token_logprobs(model, batch, rollouts.sampling.temperature).logprobs
    return out


class PolicyUpdate:
    """Computes the gradients of an objective, one optimizer step at a time.

    The gradient does not depend on how a step is cut into micro-batches: each token carries its share of the whole
    step's loss from the start.

    Args:
        algorithm: the objective.
        tokens_per_micro_batch: tokens, padding included, in one forward and backward.
        max_grad_norm: the gradient is clipped to this norm.
    """

    def __init__(self, algorithm: Algorithm, tokens_per_micro_batch: int, max_grad_norm: float) -> None:
        self.algorithm = algorithm
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.max_grad_norm = max_grad_norm
        self._seen = _Averages()

    def steps(
        self, policy: PreTrainedModel, experience: Experience, seed: int, backward: Callable[[Tensor], None]
    ) -> Iterator[Step]:
        """Yields each time a clipped gradient is ready; the caller steps the optimizer and clears the gradient.

        Args:
            policy: the model to train.
            experience: prepared by the objective.
            seed: of the order of samples when there are several minibatches.
            backward: called with each micro-batch's loss.
        """
        self._seen = _Averages()
        order = torch.Generator().manual_seed(seed)
        samples = len(experience.rollouts)
        for epoch in range(self.algorithm.update_epochs):
            parts = [torch.arange(samples)]
            if self.algorithm.minibatches > 1:  # of whole groups, so that samples of a prompt stay together
                groups = torch.arange(samples).view(-1, experience.rollouts.group_size)
                mixed = groups[torch.randperm(len(groups), generator=order)]
                parts = [part.flatten().sort().values for part in mixed.chunk(self.algorithm.minibatches)]
            for number, part in enumerate(parts):
                loss = self._accumulate(policy, experience, part, backward, epoch == 0)
                yield self._close(policy, loss, first=epoch == 0 and number == 0)

    def _accumulate(
        self,
        policy: PreTrainedModel,
        experience: Experience,
        part: Tensor,
        backward: Callable[[Tensor], None],
        first_epoch: bool,
    ) -> float:
        rollouts, device = experience.rollouts, experience.lengths.device
        lengths, samples = experience.lengths[part.to(device)], part.tolist()
        mask = (
            torch.ones_like(lengths, dtype=torch.bool) if experience.mask is None else experience.mask[part.to(device)]
        )
        shares = self.algorithm.token_weights(lengths, mask, rollouts.sampling.max_new_tokens)
        weights = torch.zeros_like(experience.engine_logprobs)
        starts = _starts(experience.lengths.cpu())
        weights[_positions(samples, starts, rollouts.lengths).to(device)] = shares
        total = torch.zeros((), dtype=torch.float32, device=device)
        share = shares_prompts(policy)
        for batch in micro_batches(rollouts, samples, self.tokens_per_micro_batch, share, device):
            where = _positions(batch.samples, starts, rollouts.lengths).to(device)
            outputs = token_logprobs(policy, batch, rollouts.sampling.temperature)
            tokens = self._tokens(experience, batch, where, weights)
            loss, metrics = self.algorithm.loss(tokens, outputs)
            backward(loss)
            total += loss.detach()
            if first_epoch:
                now = outputs.logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
                metrics |= _mismatch(now, tokens.engine_logprobs)
            self._seen.add(metrics)
        return float(total)

    def _tokens(self, experience: Experience, batch: MicroBatch, where: Tensor, weights: Tensor) -> TokenBatch:
        assert experience.advantages is not None, "Algorithm.prepare sets the advantages"
        lengths = experience.lengths[batch.samples]
        advantages = experience.advantages
        if len(advantages) == len(experience.rollouts):
            per_token = advantages[batch.samples].repeat_interleave(lengths)
        else:
            per_token = advantages[where]
        return TokenBatch(
            sample=torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths),
            lengths=lengths,
            advantages=per_token,
            old_logprobs=None if experience.old_logprobs is None else experience.old_logprobs[where],
            ref_logprobs=None if experience.ref_logprobs is None else experience.ref_logprobs[where],
            engine_logprobs=experience.engine_logprobs[where],
            weights=weights[where],
        )

    def _close(self, policy: PreTrainedModel, loss: float, first: bool) -> Step:
        norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), self.max_grad_norm))
        problem = None
        if not math.isfinite(loss):
            problem = f"the loss is {loss}"
        elif not math.isfinite(norm):
            problem = f"the gradient's norm is {norm}"
        self._seen.add_step(
            {"policy/loss": loss, "policy/grad_norm": norm, "policy/skipped": float(problem is not None)}
        )
        return Step(problem)

    def metrics(self) -> dict[str, float]:
        """What was seen in the steps of the last rollout batch, under final names."""
        return self._seen.result()


def _mismatch(logprobs: Tensor, engine_logprobs: Tensor) -> dict[str, Tensor]:
    """How far the engine that sampled is from the trainer: KL(engine ‖ trainer) by k3, and the largest gap in nats."""
    gap = logprobs - engine_logprobs
    return {"engine/mismatch_kl": gap.exp() - 1 - gap, "engine/mismatch_max": gap.abs()}


class _Averages:
    """Per-token values averaged over the tokens of all steps, `_max` ones maximised; per-step values over steps."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._steps: dict[str, list[float]] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds [t] values of one micro-batch; kept on their device, since reading each would wait for it."""
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
        """All means and maxima."""
        tokens = {name: float(total) / self._tokens.get(name, 1) for name, total in self._sums.items()}
        return tokens | {name: sum(values) / len(values) for name, values in self._steps.items()}


def _starts(lengths: Tensor) -> Tensor:
    """Where each sample's tokens begin when all lie end to end: [B] int64."""
    return lengths.cumsum(0) - lengths


def _positions(samples: list[int], starts: Tensor, lengths: list[int]) -> Tensor:
    """Positions in the flat token tensors of the given samples, samples in the given order: int64."""
    return torch.cat([torch.arange(int(starts[i]), int(starts[i]) + lengths[i]) for i in samples])
