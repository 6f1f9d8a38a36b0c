"""On-policy DPO: direct preference optimization on the policy's own best and worst samples."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlmt.algorithms.base import Algorithm
from rlmt.algorithms.pairs import best_and_worst, tie_key
from rlmt.errors import UserError
from rlmt.options import IntAboveOne, NonNegativeFloat, PositiveFloat, PositiveInt, check_ranges
from rlmt.types import Experience, PolicyOutputs, TokenBatch

PairLoss = Literal["sigmoid", "ipo", "ipo_sum", "length_normalized"]

PAIR_METRICS = (
    *("dpo/accuracy", "dpo/margin", "dpo/chosen_reward", "dpo/rejected_reward"),
    *("dpo/chosen_logprobs", "dpo/rejected_logprobs", "policy/entropy"),
)
"""Metrics that `loss` computes per pair."""


class DPO(Algorithm):
    """Direct preference optimization (arXiv 2305.18290) on pairs of the policy's own samples.

    Among the well-formed samples of a prompt, the one with the highest reward is chosen and the one with the lowest is
    rejected. The reward scores only their responses; the loss includes their thoughts. The reference is the initial
    policy.

    With the log-ratio Δ(y) = log pi(y) - log ref(y), summed over all tokens of a completion, the loss of a pair is

    - `sigmoid`: -log σ(beta (Δ_chosen - Δ_rejected)) (arXiv 2305.18290, eq. 7),
    - `ipo`: (Δ_chosen - Δ_rejected - 1 / (2 beta))² with each Δ divided by its completion's tokens, as its authors ran
      it (arXiv 2310.12036, eq. 17, where beta is called tau),
    - `ipo_sum`: the same with Δ as it is, which is the equation by the letter,
    - `length_normalized`: the sigmoid loss with each Δ divided by its completion's tokens (Tülu 3, arXiv 2411.15124),
      so beta has to be larger (5 in the paper).

    The loss of an optimizer step is the mean over its pairs. Log-probs are at temperature 1, whatever the sampling
    temperature.

    Args:
        beta: Strength of the pull towards the reference.
        loss: Pair loss: sigmoid, ipo, ipo_sum or length_normalized.
        min_valid: Minimum number of well-formed samples; prompts with fewer are skipped.
        min_margin: Minimum difference of best and worst reward; prompts with less, or with equal rewards, are skipped.
        max_tokens: Maximum length of a sample in tokens, prompt included; longer pairs are dropped; null keeps all.
        update_epochs: Number of passes over the pairs of a rollout batch.
        minibatches: Number of optimizer steps per pass.
        seed: Seed of the choice among samples of equal reward.

    Raises:
        UserError: An option is out of range.
    """

    logprob_temperature = 1.0

    def __init__(
        self,
        beta: PositiveFloat = 0.1,
        loss: PairLoss = "sigmoid",
        min_valid: IntAboveOne = 4,
        min_margin: NonNegativeFloat = 0.0,
        max_tokens: PositiveInt | None = 8192,
        update_epochs: PositiveInt = 1,
        minibatches: PositiveInt = 1,
        seed: int = 0,
    ) -> None:
        check_ranges(DPO, locals())
        self.beta, self.pair_loss = beta, loss
        self.min_valid, self.min_margin, self.max_tokens = min_valid, min_margin, max_tokens
        self.update_epochs, self.minibatches = update_epochs, minibatches
        self.seed = seed

    @property
    def needs_reference(self) -> bool:
        """True: the loss uses log-ratios to the reference."""
        return True

    def check(self, group_size: int) -> None:
        """Raises UserError for groups smaller than `min_valid`, which never form a pair."""
        if group_size < self.min_valid:
            raise UserError(
                f"--data.group_size is {group_size}: DPO needs {self.min_valid} or more well-formed samples of a prompt"
                " (--model.algorithm.min_valid); raise group_size (the paper uses 8) or lower min_valid (at least 2)."
            )

    def select(self, experience: Experience) -> None:
        """Selects the pairs and counts the prompts without one."""
        rollouts, group = experience.rollouts, experience.group
        prompts = torch.tensor([len(ids) for ids in rollouts.prompt_ids], device=group.device)
        owners = [rollouts.prompts[prompt].index for prompt in group.tolist()]
        found = best_and_worst(
            experience.scores.total,
            [split.ok for split in experience.splits],
            group,
            prompts[group] + experience.lengths,
            [tie_key(self.seed, *sample) for sample in zip(owners, rollouts.completion_ids, strict=True)],
            self.min_valid,
            self.min_margin,
            self.max_tokens,
        )
        experience.pairs = found.pairs
        experience.metrics |= {
            "dpo/pairs": float(len(found.pairs)),
            "dpo/skipped_malformed": float(found.malformed),
            "dpo/skipped_margin": float(found.margin),
            "dpo/skipped_length": float(found.length),
        }
        if not len(found.pairs):  # without pairs the step has no loss and is skipped
            experience.metrics |= dict.fromkeys(PAIR_METRICS, math.nan)

    def prepare(self, experience: Experience) -> None:
        """Nothing: the loss requires the pairs and the reference's log-probs alone."""

    def token_weights(self, lengths: Tensor, mask: Tensor, max_new_tokens: int) -> Tensor:
        """Computes 1 / (number of pairs of the step) for each token: the weight of its pair."""
        pairs = (mask.sum() / 2).clamp(min=1)
        return (mask / pairs).repeat_interleave(lengths)

    def loss(self, batch: TokenBatch, outputs: PolicyOutputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss and the metrics of the micro-batch's pairs.

        The implicit reward of a sample is beta · Δ. `dpo/accuracy` is the fraction of pairs whose chosen sample has the
        higher one; equal ones, as before the first step, count as half.
        """
        assert batch.ref_logprobs is not None

        def sum_per_sample(values: Tensor) -> Tensor:  # [t] → [b]
            return torch.zeros_like(batch.lengths, dtype=values.dtype).index_add(0, batch.sample, values)

        ratios = sum_per_sample(outputs.logprobs - batch.ref_logprobs)
        if self.pair_loss in ("length_normalized", "ipo"):
            ratios = ratios / batch.lengths
        gap = ratios[::2] - ratios[1::2]
        is_ipo = self.pair_loss in ("ipo", "ipo_sum")
        losses = (gap - 1 / (2 * self.beta)).square() if is_ipo else -logsigmoid(self.beta * gap)
        weights = batch.weights[batch.lengths.cumsum(0) - batch.lengths][::2]
        logprobs, rewards = sum_per_sample(outputs.logprobs.detach()), self.beta * ratios.detach()
        margin = rewards[::2] - rewards[1::2]
        metrics = {
            "dpo/accuracy": (margin.sign() + 1) / 2,
            "dpo/margin": margin,
            "dpo/chosen_reward": rewards[::2],
            "dpo/rejected_reward": rewards[1::2],
            "dpo/chosen_logprobs": logprobs[::2],
            "dpo/rejected_logprobs": logprobs[1::2],
            "policy/entropy": outputs.entropy.detach(),
        }
        return torch.sum(losses * weights), metrics
