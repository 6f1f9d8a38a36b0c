"""GRPO: group-relative policy optimisation, as the paper runs it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlmt.algorithms.advantages import group_advantages
from rlmt.algorithms.critic_free import CriticFree
from rlmt.types import Experience


class GRPO(CriticFree):
    """Group-relative policy optimisation (arXiv 2402.03300) with the RLMT authors' settings as defaults.

    Args:
        normalize_std: divide group advantages by the group's standard deviation, as the authors' code does; Dr. GRPO
            does not.
        **options: those of `CriticFree`.

    Raises:
        UserError: an argument is out of its range.
    """

    def __init__(self, normalize_std: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.normalize_std = normalize_std

    def advantages(self, rewards: Tensor, experience: Experience) -> Tensor:
        """Advantage of each sample against its group."""
        return group_advantages(rewards, experience.group, self.normalize_std)
