"""Held-out rewards: rewards that are only evaluated, to detect over-optimisation of the training reward.

They score the responses to validation and test prompts, with the same rule for malformed samples as the training
reward, and never contribute to a gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import cast

from torch import nn

from rlmt.errors import UserError
from rlmt.rewards.base import Reward
from rlmt.rewards.scoring import MalformedMode, score
from rlmt.types import Experience, Scores

RESERVED_NAMES = ("reward_mean", "malformed", "thought_tokens", "response_tokens")
"""Names of other metrics that are logged under `val/` and `test/`."""


class HeldOutRewards(nn.Module):
    """Rewards, possibly none, that only score validation and test responses.

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
        """Names of the rewards, in order."""
        return [reward.name for reward in self._rewards]

    def check(self, trained: Reward) -> None:
        """Checks the names, then every reward.

        Args:
            trained: The training reward.

        Raises:
            UserError: A name is used by another reward or metric, or a reward is invalid.
        """
        counts = Counter([*self.names, *trained.part_names, *RESERVED_NAMES])
        for name in self.names:
            if counts[name] > 1:
                raise UserError(
                    f"--model.held_out_rewards: the name {name!r} is used by another reward or metric; set another "
                    "`name` for the held-out reward."
                )
        for reward in self._rewards:
            reward.check()

    def load(self) -> None:
        """Loads every reward."""
        for reward in self._rewards:
            reward.load()

    def scores(self, experience: Experience, mode: MalformedMode, penalty: float) -> dict[str, Scores]:
        """Computes the scores of a batch under each reward.

        Args:
            experience: B samples with their splits and texts.
            mode: How malformed samples are scored.
            penalty: Score of a malformed sample in mode `penalty`; the lowest well-formed score of a reward replaces it
                where that is lower.

        Returns:
            Reward name → scores of the B samples.
        """
        prompts = experience.rollouts.prompt_per_sample
        return {
            reward.name: score(reward, prompts, experience.splits, experience.texts, mode, penalty)
            for reward in self._rewards
        }
