"""Two policies' completions for the same prompt, and the result where one of them is malformed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlmt.evaluation.statistics import Floats
from rlmt.types import Prompt, Split

WIN, TIE, LOSS = 1.0, 0.5, 0.0
"""Points of policy A."""


@dataclass(frozen=True)
class Pair:
    """The completions of both policies for one prompt."""

    prompt: Prompt
    first: Split
    """Completion of policy A."""
    second: Split
    """Completion of policy B."""

    @property
    def well_formed(self) -> bool:
        """Whether both completions are well formed, so that their responses can be compared."""
        return self.first.ok and self.second.ok

    @property
    def points_by_form(self) -> float:
        """Points of A where a completion is malformed: it loses against a well-formed one, and two of them tie."""
        return TIE if self.first.ok == self.second.ok else WIN if self.first.ok else LOSS


def fill_points(pairs: Sequence[Pair], judged: Sequence[float]) -> Floats:
    """Points of A in all pairs.

    Args:
        pairs: n pairs.
        judged: Points in the well-formed pairs, in their order; nan where there is no verdict.

    Returns:
        [n] points, those by form included.
    """
    results = iter(judged)
    return np.array([next(results) if pair.well_formed else pair.points_by_form for pair in pairs], dtype=np.float64)
