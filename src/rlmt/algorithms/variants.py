"""Named variants, each a few lines over what it varies. A class fixes what its paper says; the rest stays an option.

Fixed values cannot be set: other values are what `GRPO` with options is for. So a run that is switched to one of them
keeps nothing of another objective's configuration that would make it something else under that name.
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
    """GRPO done right (https://arxiv.org/abs/2503.20783): no division by the group's spread or a sample's length.

    Args:
        **options: those of `GRPO` that the paper leaves open.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(
            normalize_std=False, loss_aggregation="constant", dual_clip=None, kl_coef=0.0, entropy_coef=0.0, **options
        )


class DAPO(GRPO):
    """Decoupled clip and dynamic sampling (https://arxiv.org/abs/2503.14476).

    Clip-higher, the mean over tokens, fresh prompts for groups of equal rewards, a soft penalty on overlong
    completions, neither KL penalty nor entropy bonus.

    Args:
        dynamic_sampling: most extra draws a step.
        overlong_penalty: what a completion of `max_new_tokens` loses; the paper's rewards are 1 and -1.
        overlong_buffer: share of `max_new_tokens` over which the penalty rises; the paper's is 4,096 of 20,480 tokens.
        **options: those of `GRPO` that the paper leaves open.
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
    """Group sequence policy optimisation (https://arxiv.org/abs/2507.18071): one ratio a sequence, clipped as a whole.

    Args:
        sequence_clip_low: clip range of a sequence's ratio below 1; a mean over tokens moves far less than a token.
        sequence_clip_high: clip range above it.
        **options: those of `GRPO` that the paper leaves open.

    Raises:
        UserError: an argument is out of its range.
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
        """[t] the mean log-ratio of the sequence that each token belongs to (eq. 7)."""
        sums = torch.zeros_like(batch.lengths, dtype=logprobs.dtype).index_add(0, batch.sample, logprobs - old)
        return (sums / batch.lengths)[batch.sample]


class REINFORCEPlusPlus(CriticFree):
    """REINFORCE++ (https://arxiv.org/abs/2501.03262): rewards to go, normalised over all tokens of the step.

    No group is compared, so one sample a prompt is enough. The KL penalty is part of each token's reward, and a token
    pays for itself and those after it.

    Args:
        reward_kl_coef: weight of the KL penalty in the reward.
        **options: those of `CriticFree` that the paper leaves open.
    """

    def __init__(self, reward_kl_coef: NonNegativeFloat = 0.001, **options: Any) -> None:
        super().__init__(reward_kl_coef=reward_kl_coef, kl_coef=0.0, dual_clip=None, entropy_coef=0.0, **options)

    def check(self, group_size: int) -> None:
        """Groups matter to dynamic sampling only."""
        if self.dynamic_sampling:
            super().check(group_size)

    def advantages(self, rewards: Tensor, experience: Experience) -> Tensor:
        """One a token: the sample's reward, less the KL penalty of this token and those after it, normalised."""
        to_go = rewards.repeat_interleave(experience.lengths)
        if self.reward_kl_coef:  # `rewards` have paid for all tokens
            to_go = to_go + sum_before(self.kl_in_reward(experience), experience.lengths)
        return whitened(to_go, torch.ones_like(to_go, dtype=torch.bool))
