"""What the policy gradients without a critic share: how rewards are shaped before they become advantages."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from rlmt.algorithms.advantages import overlong_penalty as penalty_of_length
from rlmt.algorithms.advantages import sum_by_sample
from rlmt.algorithms.policy_gradient import PolicyGradient
from rlmt.errors import UserError
from rlmt.options import NonNegativeFloat, NonNegativeInt, UnitIntervalAboveZero, check_ranges
from rlmt.types import Experience


class CriticFree(PolicyGradient):
    """A policy gradient whose advantages come from the rewards of a step alone; `advantages` says how.

    A sample's shaped reward = its score + overlong_penalty · soft length penalty - reward_kl_coef · Σ token KL.
    Metrics of rewards are of the scores themselves.

    Args:
        reward_kl_coef: weight of a KL penalty in the reward, where `kl_coef` weighs the one in the loss: the k1
            estimates of all tokens of a completion, added up.
        overlong_penalty: what a completion of `max_new_tokens` loses (DAPO, arXiv 2503.14476, eq. 13); 0 is off.
        overlong_buffer: share of `max_new_tokens`, at its end, over which the penalty rises from 0.
        dynamic_sampling: most extra draws a step, each of a whole batch of fresh prompts, that replace groups whose
            scores are all equal (DAPO); 0 trains on every group.
        **options: those of `PolicyGradient`.

    Raises:
        UserError: an argument is out of its range.
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
        """For a KL penalty, wherever it is."""
        return self.kl_coef > 0 or self.reward_kl_coef > 0

    @property
    def needs_old_logprobs(self) -> bool:
        """For the KL penalty in the reward."""
        return self.reward_kl_coef > 0

    def check(self, group_size: int) -> None:
        """A group of one has nothing to be compared with."""
        if group_size < 2:
            raise UserError(
                f"--data.group_size is {group_size}: {type(self).__name__} compares samples of one prompt, and a group "
                "of one has no standard deviation and always has advantage 0; set it to 2 or more (the paper uses 8)."
            )

    def prepare(self, experience: Experience) -> None:
        """Shapes the rewards and makes advantages of them."""
        rewards = experience.scores.total
        if self.overlong_penalty:
            limit = experience.rollouts.sampling.max_new_tokens
            penalty = self.overlong_penalty * penalty_of_length(experience.lengths, limit, self.overlong_buffer)
            rewards = rewards + penalty
            experience.metrics["reward/overlong_penalty"] = float(penalty.mean())
        if self.reward_kl_coef:
            rewards = rewards - sum_by_sample(self.kl_in_reward(experience), experience.lengths)
        experience.advantages = self.advantages(rewards, experience)
        if self.mask_truncated:
            experience.mask = ~experience.truncated

    def kl_in_reward(self, experience: Experience) -> Tensor:
        """[T] float32 what each token costs its sample: reward_kl_coef · (log old policy - log reference)."""
        assert experience.old_logprobs is not None and experience.ref_logprobs is not None
        return self.reward_kl_coef * (experience.old_logprobs - experience.ref_logprobs)

    @abstractmethod
    def advantages(self, rewards: Tensor, experience: Experience) -> Tensor:
        """Advantages from shaped rewards.

        Args:
            rewards: [B] float32 shaped rewards.
            experience: the samples; `group` says which belong together.

        Returns:
            [B] float32, one a sample, or [T], one a token.
        """
