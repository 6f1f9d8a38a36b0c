"""A weighted sum of rewards, on a common scale if wanted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rlmt.distributed.collectives import all_gather_tensor
from rlmt.errors import UserError
from rlmt.rewards.base import Reward
from rlmt.types import Prompt, Status

Scale = Literal["none", "batch_std", "running_std"]
"""What the scores of a part are divided by before they are weighted.

`none`: Nothing.
`batch_std`: Their standard deviation over the batch, all ranks together.
`running_std`: Their standard deviation over all training batches so far, this one included.
"""


class WeightedSum(Reward):
    """Adds several rewards, each multiplied by its weight; the raw scores of each are logged under its name.

    Scores of different ranges, such as a logit of ±20 and a rule of 0 or 1, count alike if each is divided by its
    standard deviation (`scale`). Standard deviations are those of the population. Scores that are all equal have none
    and are not divided. `running_std` is updated by training batches only; its statistics are saved in checkpoints.

    The share of a part, logged as `<name>_share`, is the standard deviation of its scaled and weighted scores over the
    batch, divided by the sum of those of all parts: how much of the sum's spread comes from it.

    Args:
        rewards: The parts, with distinct names.
        weights: One finite weight per part, in the same order.
        scale: What the scores of each part are divided by: none, batch_std or running_std; one per part, in the same
            order. Null divides none.
        name: Name of the sum, if it is part of another one.

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
              scale: [running_std, none]
    """

    def __init__(
        self,
        rewards: list[Reward],
        weights: list[float],
        scale: list[Scale] | None = None,
        name: str = "weighted_sum",
    ) -> None:
        super().__init__()
        self.name = name
        self.rewards = nn.ModuleList(rewards)
        self.weights = weights
        self.scale: list[Scale] = ["none"] * len(rewards) if scale is None else scale
        self._moments = [RunningMoments() for _ in rewards]

    @property
    def parts(self) -> list[Reward]:
        """The rewards of the sum."""
        return [cast(Reward, reward) for reward in self.rewards]

    @property
    def part_names(self) -> list[str]:
        """Names under which scores and shares are logged, those of nested sums included."""
        return [name for part in self.parts for name in (*part.part_names, _share_name(part))]

    def check(self) -> None:
        """Checks the weights, scales and names, then every part.

        Raises:
            UserError: There are no parts, the weights or scales do not match, a weight is not finite, two parts have
                the same name, or a part is invalid.
        """
        if not self.parts or len(self.parts) != len(self.weights):
            raise UserError(
                f"WeightedSum has {len(self.parts)} rewards and {len(self.weights)} weights; set one weight per reward."
            )
        if len(self.parts) != len(self.scale):
            raise UserError(
                f"WeightedSum has {len(self.parts)} rewards and {len(self.scale)} values in scale; set one per reward."
            )
        for reward, weight in zip(self.parts, self.weights, strict=True):
            if not math.isfinite(weight):
                raise UserError(f"WeightedSum: the weight of reward {reward.name!r} is {weight}; use a finite number.")
        duplicates = [name for name, count in Counter(self.part_names).items() if count > 1]
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
        """Returns the weighted sum, and the raw scores and the share of each part by name, nested sums included."""
        total = torch.zeros(len(responses), dtype=torch.float32)
        parts: dict[str, Tensor] = {}
        spreads: dict[str, float] = {}
        for reward, weight, scale, moments in zip(self.parts, self.weights, self.scale, self._moments, strict=True):
            scores, inner = reward.score_parts(prompts, responses, statuses)
            scores = scores.to(total)
            gathered, batch = all_gather_tensor(scores), RunningMoments()
            batch.update(gathered)
            if scale == "running_std" and self.training:
                moments.update(gathered)
            divisor = {"none": 1.0, "batch_std": batch.std, "running_std": moments.std}[scale] or 1.0
            total += weight * (scores / divisor)
            spreads[_share_name(reward)] = abs(weight) * batch.std / divisor
            parts |= inner
        whole = sum(spreads.values()) or 1.0
        return total, parts | {name: torch.full_like(total, spread / whole) for name, spread in spreads.items()}

    def running_state(self) -> dict[str, Any]:
        """Count, mean and sum of squared deviations of each part that `running_std` scales."""
        return {
            str(number): [moments.count, moments.mean, moments.squares]
            for number, moments in enumerate(self._moments)
            if moments.count
        }

    def load_running_state(self, state: Mapping[str, Any]) -> None:
        """Restores the statistics."""
        for number, (count, mean, squares) in state.items():
            if int(number) < len(self._moments):
                self._moments[int(number)] = RunningMoments(count, mean, squares)


class RunningMoments:
    """Mean and standard deviation of a stream of numbers, merged batch by batch.

    Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979),
    equation 2.1.

    Args:
        count: Number of values so far.
        mean: Their mean.
        squares: Sum of their squared deviations from the mean.
    """

    def __init__(self, count: int = 0, mean: float = 0.0, squares: float = 0.0) -> None:
        self.count, self.mean, self.squares = count, mean, squares

    def update(self, values: Tensor) -> None:
        """Adds [n] values; n may be 0."""
        if not len(values):
            return
        values = values.double()
        count, mean = len(values), float(values.mean())
        # Deviations of equal numbers from their mean can come out as 1e-17.
        squares = 0.0 if bool((values == values[0]).all()) else float((values - mean).square().sum())
        shift, total = mean - self.mean, self.count + count
        self.squares += squares + (shift**2 * self.count * count / total if shift else 0.0)
        self.mean += shift * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation of the population; 0 without values."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


def _share_name(reward: Reward) -> str:
    return f"{reward.name}_share"
