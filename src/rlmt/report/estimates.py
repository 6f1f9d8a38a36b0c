"""Means and paired differences over seeds or samples, with 95 % confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds or samples with its confidence interval."""

    values: tuple[float, ...]
    """One value per seed or sample."""

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return statistics.fmean(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean by Student's t; None for a single value."""
        n = len(self.values)
        if n < 2:
            return None
        half = float(student.ppf(0.5 + CONFIDENCE / 2, n - 1)) * statistics.stdev(self.values) / math.sqrt(n)
        return self.mean - half, self.mean + half

    @classmethod
    def of_ratio(cls, sums: Sequence[float], weights: Sequence[float]) -> Estimate:
        """The ratio of two sums over samples, such as a mean over the tokens of rows, with the samples as the units.

        The values are the linearized ones, R + (s - R w) / mean(w) with R = Σ s / Σ w (Cochran 1977, Sampling
        Techniques, section 6.4): their mean is R, and with equal weights they are s / w.

        Args:
            sums: Sum of each sample.
            weights: Weight of each sample; not all 0.
        """
        ratio, mean_weight = sum(sums) / sum(weights), statistics.fmean(weights)
        return cls(tuple(ratio + (s - ratio * w) / mean_weight for s, w in zip(sums, weights, strict=True)))

    @property
    def p_value(self) -> float | None:
        """Two-sided p-value of Student's t-test that the mean is 0; None for a single value."""
        n = len(self.values)
        if n < 2:
            return None
        error = statistics.stdev(self.values) / math.sqrt(n)
        if error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return 2 * float(student.sf(abs(self.mean) / error, n - 1))

    def minus(self, other: Estimate) -> Estimate:
        """Differences paired by seed."""
        return Estimate(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))

    def format(self, digits: int = 1) -> str:
        """`80.8 ± 1.9`, the mean and half of the interval's width; the mean alone for one value, a dash for nan."""
        if math.isnan(self.mean):
            return "–"
        mean = f"{self.mean:.{digits}f}"
        return mean if self.interval is None else f"{mean} ± {self.interval[1] - self.mean:.{digits}f}"


def correct_by_holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for the number of tests, so that one in twenty families has a false finding at 0.05.

    Holm's step-down method (S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979): the k-th
    smallest of n is multiplied by n - k + 1, and none falls below a smaller one. It holds for dependent tests, such as
    comparisons that share an arm.

    Args:
        p_values: The p-values of all tests.

    Returns:
        The corrected p-values in the same order.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=lambda number: p_values[number])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        corrected[number] = largest
    return corrected
