"""A weighted sum of rewards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from rlmt.errors import UserError
from rlmt.rewards.base import Reward
from rlmt.types import Message, Status


class WeightedSum(Reward):
    """Adds several rewards, each times its weight; the raw scores of each are logged under its own name.

    Args:
        rewards: The parts; their names must differ.
        weights: One finite weight a part, in the same order.

    Example:
        In a configuration::

            class_path: rlmt.rewards.WeightedSum
            init_args:
              rewards:
                - class_path: rlmt.rewards.ClassifierReward
                  init_args: {model: Skywork/Skywork-Reward-Llama-3.1-8B-v0.2}
                - class_path: rlmt.rewards.RegexReward
                  init_args: {pattern: please, name: polite}
              weights: [1.0, 0.2]
    """

    name = "weighted_sum"

    def __init__(self, rewards: list[Reward], weights: list[float]) -> None:
        super().__init__()
        self.rewards = nn.ModuleList(rewards)
        self.weights = weights

    @property
    def parts(self) -> list[Reward]:
        """The rewards that are added."""
        return [cast(Reward, reward) for reward in self.rewards]

    def check(self) -> None:
        """Checks itself, then every part.

        Raises:
            UserError: No parts, not one finite weight a part, two parts of the same name, or a mistake in a part.
        """
        if not self.parts or len(self.parts) != len(self.weights):
            raise UserError(
                f"WeightedSum has {len(self.parts)} rewards and {len(self.weights)} weights: give one weight a reward"
            )
        for reward, weight in zip(self.parts, self.weights, strict=True):
            if not math.isfinite(weight):
                raise UserError(f"WeightedSum: the weight of reward {reward.name!r} is {weight}: give a finite number")
        twice = [name for name, count in Counter(leaf_names(self)).items() if count > 1]
        if twice:
            raise UserError(f"WeightedSum has two rewards named {twice[0]!r}: set `name` so that they differ")
        for reward in self.parts:
            reward.check()

    def load(self) -> None:
        """Loads every part."""
        for reward in self.parts:
            reward.load()

    def score(self, prompts: Sequence[list[Message]], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """See `Reward.score`: the weighted sum."""
        return self.score_parts(prompts, responses, statuses)[0]

    def score_parts(
        self, prompts: Sequence[list[Message]], responses: Sequence[str], statuses: Sequence[Status]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each part's raw scores by name; a nested sum gives the scores of its own parts."""
        total = torch.zeros(len(responses), dtype=torch.float32)
        parts: dict[str, Tensor] = {}
        for reward, weight in zip(self.parts, self.weights, strict=True):
            scores, inner = reward.score_parts(prompts, responses, statuses)
            total += weight * scores.to(total)
            parts |= inner
        return total, parts


def leaf_names(reward: Reward) -> list[str]:
    """Names under which the scores of `reward` are logged."""
    if isinstance(reward, WeightedSum):
        return [name for part in reward.parts for name in leaf_names(part)]
    return [reward.name]
