"""Named variants of GRPO and REINFORCE; each fixes the values of its paper and leaves the rest as options.

Fixed values cannot be set; use `GRPO` with options for other values. So a run that switches to a variant keeps no
option of another algorithm that would contradict the variant's name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlmt.algorithms.advantages import sum_before, whitened
from rlmt.algorithms.critic_free import CriticFree
from rlmt.algorithms.grpo import GRPO
from rlmt.options import (
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    UnitIntervalAboveZero,
    check_ranges,
)
from rlmt.types import Experience, TokenBatch


class DrGRPO(GRPO):
    """GRPO done right (https://arxiv.org/abs/2503.20783): no division by standard deviation or sample length.

    Args:
        **options: Options of `GRPO` that the paper does not fix.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(
            normalize_std=False, loss_aggregation="constant", dual_clip=None, kl_coef=0.0, entropy_coef=0.0, **options
        )


class DAPO(GRPO):
    """Decoupled clip and dynamic sampling (https://arxiv.org/abs/2503.14476).

    Clip-higher, the mean over tokens, new prompts for groups of equal rewards, a soft penalty on overlong completions,
    no KL penalty and no entropy bonus.

    Args:
        dynamic_sampling: Maximum number of extra rollout batches per step.
        overlong_penalty: Penalty of a completion of `max_new_tokens`; the paper's rewards are 1 and -1.
        overlong_buffer: Fraction of `max_new_tokens` over which the penalty rises; 4,096 of 20,480 in the paper.
        **options: Options of `GRPO` that the paper does not fix.
    """

    def __init__(
        self,
        dynamic_sampling: NonNegativeInt = 4,
        overlong_penalty: NonNegativeFloat = 1.0,
        overlong_buffer: UnitIntervalAboveZero = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(
            dynamic_sampling=dynamic_sampling,
            overlong_penalty=overlong_penalty,
            overlong_buffer=overlong_buffer,
            normalize_std=True,
            loss_aggregation="token_mean",
            clip_low=0.2,
            clip_high=0.28,
            dual_clip=None,
            kl_coef=0.0,
            entropy_coef=0.0,
            **options,
        )


class GSPO(GRPO):
    """Group sequence policy optimization (https://arxiv.org/abs/2507.18071): one clipped ratio per sequence.

    Args:
        sequence_clip_low: Clip range of a sequence's ratio below 1; it varies far less than a token's ratio.
        sequence_clip_high: Clip range of a sequence's ratio above 1.
        **options: Options of `GRPO` that the paper does not fix.

    Raises:
        UserError: An option is out of range.
    """

    def __init__(
        self, sequence_clip_low: OpenUnitInterval = 3e-4, sequence_clip_high: PositiveFloat = 4e-4, **options: Any
    ) -> None:
        check_ranges(GSPO, locals())
        self.sequence_clip_low, self.sequence_clip_high = sequence_clip_low, sequence_clip_high
        super().__init__(
            loss_aggregation="sequence_mean",
            clip_low=sequence_clip_low,
            clip_high=sequence_clip_high,
            dual_clip=None,
            entropy_coef=0.0,
            **options,
        )

    def log_ratio(self, logprobs: Tensor, old: Tensor, batch: TokenBatch) -> Tensor:
        """Mean log-ratio of each token's sequence, [t] (eq. 7)."""
        sums = torch.zeros_like(batch.lengths, dtype=logprobs.dtype).index_add(0, batch.sample, logprobs - old)
        return (sums / batch.lengths)[batch.sample]


class REINFORCEPlusPlus(CriticFree):
    """REINFORCE++ (https://arxiv.org/abs/2501.03262): rewards-to-go, whitened over the tokens of the step in the loss.

    Samples of one prompt are not compared, so one sample per prompt is enough. The KL penalty is part of each token's
    reward, so a token's reward-to-go includes the penalties of itself and of later tokens.

    Args:
        reward_kl_coef: Weight of the KL penalty in the reward.
        **options: Options of `CriticFree` that the paper does not fix.
    """

    def __init__(self, reward_kl_coef: NonNegativeFloat = 0.001, **options: Any) -> None:
        super().__init__(reward_kl_coef=reward_kl_coef, kl_coef=0.0, dual_clip=None, entropy_coef=0.0, **options)

    def check(self, group_size: int) -> None:
        """Raises UserError for groups of one sample with dynamic sampling, which alone compares samples of a group."""
        if self.dynamic_sampling:
            super().check(group_size)

    def advantages(self, rewards: Tensor, experience: Experience) -> Tensor:
        """Computes whitened rewards-to-go per token: the reward minus the KL penalties of this and later tokens."""
        to_go = rewards.repeat_interleave(experience.lengths)
        if self.reward_kl_coef:  # `rewards` include the penalties of all tokens, so the earlier ones are added back
            to_go = to_go + sum_before(self.kl_in_reward(experience), experience.lengths)
        mask = torch.ones_like(experience.lengths, dtype=torch.bool) if experience.mask is None else experience.mask
        return whitened(to_go, mask.repeat_interleave(experience.lengths))
