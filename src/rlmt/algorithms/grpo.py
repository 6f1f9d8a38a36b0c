"""GRPO: group relative policy optimization."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlmt.algorithms.advantages import group_advantages
from rlmt.algorithms.critic_free import CriticFree
from rlmt.types import Experience


class GRPO(CriticFree):
    """Group relative policy optimization (arXiv 2402.03300) with the RLMT authors' settings as defaults.

    Args:
        normalize_std: Whether advantages are divided by the group's standard deviation, as in the authors' code;
            Dr. GRPO does not divide.
        **options: Options of `CriticFree`.

    Raises:
        UserError: An option is out of range.
    """

    def __init__(self, normalize_std: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.normalize_std = normalize_std

    def advantages(self, rewards: Tensor, experience: Experience) -> Tensor:
        """Computes the advantage of each sample relative to its group."""
        return group_advantages(rewards, experience.group, self.normalize_std)
