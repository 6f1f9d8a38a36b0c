"""Calibration of a reward model: predicted preference σ(score difference) against observed accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Bin:
    """Pairs with similar absolute score differences."""

    predicted: float
    """Mean probability that the model assigns to the response that it prefers, 0.5 to 1."""
    observed: float
    """Fraction of pairs for which the preferred response is the better one."""
    count: int
    """Number of pairs."""


def calibration_bins(differences: NDArray[np.float64], bins: int = 10) -> list[Bin]:
    """Sorts pairs by predicted probability into bins, and computes the accuracy in each.

    Swapping the responses of a pair does not change its information, so each pair is counted once, from the side that
    the model prefers: it predicts with probability σ(|difference|) that this side is the better one. The sizes of the
    bins differ by at most one pair.

    Args:
        differences: [n] Score of the better minus score of the worse response of each pair. A difference of 0 counts as
            half correct.
        bins: Maximum number of bins.

    Returns:
        Non-empty bins in ascending order of predicted probability.
    """
    order = np.argsort(np.abs(differences), kind="stable")
    return [
        Bin(
            predicted=float(np.mean(1 / (1 + np.exp(-np.abs(part))))),
            observed=float(np.mean((part > 0) + 0.5 * (part == 0))),
            count=len(part),
        )
        for part in np.array_split(differences[order], bins)
        if len(part)
    ]


def calibration_error(bins: list[Bin]) -> float:
    """Expected calibration error: the mean of |predicted - observed| over bins, weighted by their number of pairs."""
    return sum(b.count * abs(b.predicted - b.observed) for b in bins) / sum(b.count for b in bins)
