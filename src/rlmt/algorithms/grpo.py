"""GRPO: group-relative policy optimisation, as the paper runs it."""

from __future__ import annotations

from typing import Any

from rlmt.algorithms.advantages import group_advantages
from rlmt.algorithms.policy_gradient import PolicyGradient
from rlmt.errors import UserError
from rlmt.types import Experience


class GRPO(PolicyGradient):
    """Group-relative policy optimisation (arXiv 2402.03300) with the RLMT authors' settings as defaults.

    Args:
        normalize_std: divide group advantages by the group's standard deviation, as the authors' code does; Dr. GRPO
            does not.
        **options: those of `PolicyGradient`.

    Raises:
        UserError: an argument is out of its range.
    """

    def __init__(self, normalize_std: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.normalize_std = normalize_std

    def check(self, group_size: int) -> None:
        """A group of one has no spread, and its advantage is always 0."""
        if group_size < 2:
            what = "has no standard deviation" if self.normalize_std else "always has advantage 0"
            raise UserError(
                f"--data.group_size is {group_size}: GRPO compares samples of one prompt, and a group of one {what}; "
                "set it to 2 or more (the paper uses 8)."
            )

    def prepare(self, experience: Experience) -> None:
        """Advantage of each sample against its group."""
        experience.advantages = group_advantages(experience.scores.total, experience.group, self.normalize_std)
        if self.mask_truncated:
            experience.mask = ~experience.truncated
