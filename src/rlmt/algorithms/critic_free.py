"""Base class of policy gradients without a critic, with reward shaping."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from rlmt.algorithms.advantages import overlong_penalty as length_penalty
from rlmt.algorithms.advantages import sum_by_sample
from rlmt.algorithms.policy_gradient import PolicyGradient
from rlmt.errors import UserError
from rlmt.options import NonNegativeFloat, NonNegativeInt, UnitIntervalAboveZero, check_ranges
from rlmt.types import Experience


class CriticFree(PolicyGradient):
    """A policy gradient whose advantages come from the rewards of one step; subclasses implement `advantages`.

    Shaped reward of a sample = score + overlong_penalty · soft length penalty - reward_kl_coef · Σ token KL. Reward
    metrics are those of the unshaped scores.

    Args:
        reward_kl_coef: Weight of a KL penalty in the reward, the sum of the k1 estimates of all tokens of a completion;
            `kl_coef` is the weight of the one in the loss.
        overlong_penalty: Penalty of a completion of `max_new_tokens` (DAPO, arXiv 2503.14476, eq. 13); 0 is off.
        overlong_buffer: Fraction of `max_new_tokens`, at its end, over which the penalty rises from 0.
        dynamic_sampling: Maximum number of extra rollout batches of new prompts per step, which replace groups of
            equal scores (DAPO); 0 trains on every group.
        **options: Options of `PolicyGradient`.

    Raises:
        UserError: An option is out of range.
    """

    def __init__(
        self,
        reward_kl_coef: NonNegativeFloat = 0.0,
        overlong_penalty: NonNegativeFloat = 0.0,
        overlong_buffer: UnitIntervalAboveZero = 0.2,
        dynamic_sampling: NonNegativeInt = 0,
        **options: Any,
    ) -> None:
        check_ranges(CriticFree, locals())
        super().__init__(**options)
        self.reward_kl_coef = reward_kl_coef
        self.overlong_penalty, self.overlong_buffer = overlong_penalty, overlong_buffer
        self.dynamic_sampling = dynamic_sampling

    @property
    def needs_reference(self) -> bool:
        """True with a KL penalty, in the loss or in the reward."""
        return self.kl_coef > 0 or self.reward_kl_coef > 0

    @property
    def needs_old_logprobs(self) -> bool:
        """True with a KL penalty in the reward."""
        return self.reward_kl_coef > 0

    def check(self, group_size: int) -> None:
        """Raises UserError for groups of one sample, which have nothing to be compared with."""
        if group_size < 2:
            raise UserError(
                f"--data.group_size is {group_size}: {type(self).__name__} compares samples of one prompt, and a group "
                "of one has no standard deviation and always has advantage 0; set it to 2 or more (the paper uses 8)."
            )

    def prepare(self, experience: Experience) -> None:
        """Shapes the rewards and computes advantages."""
        rewards = experience.scores.total
        if self.overlong_penalty:
            limit = experience.rollouts.sampling.max_new_tokens
            penalty = self.overlong_penalty * length_penalty(experience.lengths, limit, self.overlong_buffer)
            rewards = rewards + penalty
            experience.metrics["reward/overlong_penalty"] = float(penalty.mean())
        if self.reward_kl_coef:
            rewards = rewards - sum_by_sample(self.kl_in_reward(experience), experience.lengths)
        if self.mask_truncated:
            experience.mask = ~experience.truncated
        experience.advantages = self.advantages(rewards, experience)

    def kl_in_reward(self, experience: Experience) -> Tensor:
        """KL penalty of each token: reward_kl_coef · (log old policy - log reference), [T] float32."""
        assert experience.old_logprobs is not None and experience.ref_logprobs is not None
        return self.reward_kl_coef * (experience.old_logprobs - experience.ref_logprobs)

    @abstractmethod
    def advantages(self, rewards: Tensor, experience: Experience) -> Tensor:
        """Computes advantages from shaped rewards.

        Args:
            rewards: [B] float32 shaped rewards.
            experience: The samples, with their `group`.

        Returns:
            [B] float32, one per sample, or [T] float32, one per token.
        """
