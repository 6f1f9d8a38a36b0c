"""Rewards that the policy is not trained on: where they part from the one that it is, it over-optimises.

They score the responses to held-out prompts, under the same rule for malformed samples as the reward that is trained
on, and are never part of a gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import cast

from torch import nn

from rlmt.errors import UserError
from rlmt.rewards.base import Reward
from rlmt.rewards.scoring import MalformedMode, score
from rlmt.rewards.weighted import leaf_names
from rlmt.types import Experience

TAKEN = ("reward_mean", "malformed", "thought_tokens", "response_tokens")
"""What else is logged of held-out prompts, under `val/` and `test/`."""


class HeldOutRewards(nn.Module):
    """Any number of rewards, none included, that score validation and test responses only.

    Args:
        rewards: The rewards; each is logged under its own `name`.
    """

    def __init__(self, rewards: Sequence[Reward] = ()) -> None:
        super().__init__()
        self.rewards = nn.ModuleList(rewards)

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def _rewards(self) -> list[Reward]:
        return [cast(Reward, reward) for reward in self.rewards]

    @property
    def names(self) -> list[str]:
        """Their names, in the order in which they were given."""
        return [reward.name for reward in self._rewards]

    def check(self, trained: Reward) -> None:
        """Checks the names, then every reward.

        Args:
            trained: The reward that is trained on.

        Raises:
            UserError: A name is taken, by `trained` for one, or there is a mistake in a reward.
        """
        counts = Counter([*self.names, *leaf_names(trained), *TAKEN])
        for name in self.names:
            if counts[name] > 1:
                raise UserError(
                    f"--model.held_out_rewards: the name {name!r} is taken by another reward or metric: give the "
                    "held-out reward another `name`"
                )
        for reward in self._rewards:
            reward.check()

    def load(self) -> None:
        """Loads every reward."""
        for reward in self._rewards:
            reward.load()

    def means(self, experience: Experience, mode: MalformedMode, penalty: float) -> dict[str, float]:
        """Mean score of a batch by name.

        Args:
            experience: B samples with their splits and texts.
            mode: What a malformed sample gets.
            penalty: Its score in mode `penalty`, or the lowest well-formed one where that is lower, reward by reward.

        Returns:
            Name of each reward → mean over all B samples, malformed ones included.
        """
        rollouts = experience.rollouts
        conversations = [prompt.messages for prompt in rollouts.prompts for _ in range(rollouts.group_size)]
        return {
            reward.name: float(
                score(reward, conversations, experience.splits, experience.texts, mode, penalty).total.mean()
            )
            for reward in self._rewards
        }
