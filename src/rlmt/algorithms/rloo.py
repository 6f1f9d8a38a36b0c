"""RLOO: REINFORCE with a leave-one-out baseline."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlmt.algorithms.advantages import leave_one_out_advantages
from rlmt.algorithms.critic_free import CriticFree
from rlmt.options import NonNegativeFloat
from rlmt.types import Experience


class RLOO(CriticFree):
    """REINFORCE leave-one-out (https://arxiv.org/abs/2402.14740).

    A completion is one action, so the log-probs of its tokens are summed, not averaged; the KL penalty is part of the
    reward. With one update per rollout batch the ratio is 1 and nothing is clipped, as in the paper.

    Args:
        reward_kl_coef: Weight of the KL penalty in the reward.
        **options: Options of `CriticFree` that the paper does not fix.
    """

    def __init__(self, reward_kl_coef: NonNegativeFloat = 0.001, **options: Any) -> None:
        super().__init__(
            reward_kl_coef=reward_kl_coef,
            kl_coef=0.0,
            loss_aggregation="constant",
            dual_clip=None,
            entropy_coef=0.0,
            **options,
        )

    def advantages(self, rewards: Tensor, experience: Experience) -> Tensor:
        """Computes the advantage of each sample relative to the mean of the others of its group."""
        return leave_one_out_advantages(rewards, experience.group)
