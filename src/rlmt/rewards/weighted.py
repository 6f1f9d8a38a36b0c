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
from rlmt.types import Prompt, Status


class WeightedSum(Reward):
    """Adds several rewards, each multiplied by its weight; the raw scores of each are logged under its name.

    Args:
        rewards: The parts, with distinct names.
        weights: One finite weight per part, in the same order.

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
        """The rewards of the sum."""
        return [cast(Reward, reward) for reward in self.rewards]

    def check(self) -> None:
        """Checks the weights and names, then every part.

        Raises:
            UserError: There are no parts, the weights do not match or are not finite, two parts have the same name, or
                a part is invalid.
        """
        if not self.parts or len(self.parts) != len(self.weights):
            raise UserError(
                f"WeightedSum has {len(self.parts)} rewards and {len(self.weights)} weights; set one weight per reward."
            )
        for reward, weight in zip(self.parts, self.weights, strict=True):
            if not math.isfinite(weight):
                raise UserError(f"WeightedSum: the weight of reward {reward.name!r} is {weight}; use a finite number.")
        duplicates = [name for name, count in Counter(leaf_names(self)).items() if count > 1]
        if duplicates:
            raise UserError(f"WeightedSum has two rewards named {duplicates[0]!r}; set a different `name`.")
        for reward in self.parts:
            reward.check()

    def load(self) -> None:
        """Loads every part."""
        for reward in self.parts:
            reward.load()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """Returns the weighted sum, see `Reward.score`."""
        return self.score_parts(prompts, responses, statuses)[0]

    def score_parts(
        self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the weighted sum, and the raw scores of each part by name, those of nested sums included."""
        total = torch.zeros(len(responses), dtype=torch.float32)
        parts: dict[str, Tensor] = {}
        for reward, weight in zip(self.parts, self.weights, strict=True):
            scores, inner = reward.score_parts(prompts, responses, statuses)
            total += weight * scores.to(total)
            parts |= inner
        return total, parts


def leaf_names(reward: Reward) -> list[str]:
    """Names under which the scores of a reward are logged."""
    if isinstance(reward, WeightedSum):
        return [name for part in reward.parts for name in leaf_names(part)]
    return [reward.name]
