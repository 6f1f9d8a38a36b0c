"""On-policy DPO: direct preference optimisation on the policy's own best and worst samples."""

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

PairLoss = Literal["sigmoid", "ipo", "length_normalized"]

OF_PAIRS = (
    *("dpo/accuracy", "dpo/margin", "dpo/chosen_reward", "dpo/rejected_reward"),
    *("dpo/chosen_logprobs", "dpo/rejected_logprobs", "policy/entropy"),
)
"""What `loss` measures on pairs."""


class DPO(Algorithm):
    """Direct preference optimisation (arXiv 2305.18290) on pairs that a reward model makes of the policy's samples.

    Of each prompt's well-formed samples the one with the highest reward is chosen and the one with the lowest rejected;
    the reward saw their responses only, the loss takes in their thoughts as well. The reference is the policy that the
    run started from.

    With the log-ratio Δ(y) = log pi(y) - log ref(y), summed over all tokens of a completion, the loss of a pair is

    - `sigmoid`: -log σ(beta (Δ_chosen - Δ_rejected)) (arXiv 2305.18290, eq. 7),
    - `ipo`: (Δ_chosen - Δ_rejected - 1 / (2 beta))² (arXiv 2310.12036, eq. 17, where beta is called tau),
    - `length_normalized`: the sigmoid loss with each Δ divided by its completion's tokens (Tülu 3, arXiv 2411.15124),
      so beta has to be larger, 5 there,

    and the mean over the pairs of an optimizer step is taken. Log-probs are the model's own, at temperature 1, whatever
    the sampling temperature.

    Args:
        beta: how much the policy is held to the reference.
        loss: sigmoid, ipo or length_normalized.
        min_valid: prompts with fewer well-formed samples are skipped.
        min_margin: prompts whose best and worst rewards are closer are skipped; equal ones always are.
        max_tokens: pairs with a longer sample, prompt included, are dropped; null keeps all.
        update_epochs: passes over the pairs of a rollout batch.
        minibatches: optimizer steps a pass.
        seed: picks among samples of equal reward.

    Raises:
        UserError: an argument is out of its range.
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
        """Always: the loss is made of ratios to it."""
        return True

    def check(self, group_size: int) -> None:
        """A group smaller than `min_valid` never makes a pair."""
        if group_size < self.min_valid:
            raise UserError(
                f"--data.group_size is {group_size}: DPO wants {self.min_valid} well-formed samples of a prompt or more"
                " (--model.algorithm.min_valid); raise the one (the paper uses 8) or lower the other (to 2 at least)."
            )

    def select(self, experience: Experience) -> None:
        """Sets the pairs, and counts prompts without one."""
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
        if not len(found.pairs):  # not measured; the step takes no gradient and leaves the policy alone
            experience.metrics |= dict.fromkeys(OF_PAIRS, math.nan)

    def prepare(self, experience: Experience) -> None:
        """Nothing: the loss requires the pairs and the reference's log-probs alone."""

    def token_weights(self, lengths: Tensor, mask: Tensor, max_new_tokens: int) -> Tensor:
        """1 / pairs of the step: each token of a pair carries the weight of its pair."""
        pairs = (mask.sum() / 2).clamp(min=1)
        return (mask / pairs).repeat_interleave(lengths)

    def loss(self, batch: TokenBatch, outputs: PolicyOutputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the micro-batch's pairs, and what each pair says of the policy.

        The implicit reward of a sample is beta · Δ. `dpo/accuracy` is the share of pairs in which the chosen sample has
        the higher one; equal ones, as before the first step, count half.
        """
        assert batch.ref_logprobs is not None

        def of_samples(values: Tensor) -> Tensor:  # [t] → [b]
            return torch.zeros_like(batch.lengths, dtype=values.dtype).index_add(0, batch.sample, values)

        ratios = of_samples(outputs.logprobs - batch.ref_logprobs)
        if self.pair_loss == "length_normalized":
            ratios = ratios / batch.lengths
        gap = ratios[::2] - ratios[1::2]
        losses = (gap - 1 / (2 * self.beta)).square() if self.pair_loss == "ipo" else -logsigmoid(self.beta * gap)
        weights = batch.weights[batch.lengths.cumsum(0) - batch.lengths][::2]
        logprobs, rewards = of_samples(outputs.logprobs.detach()), self.beta * ratios.detach()
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
