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

    def minus(self, other: Estimate) -> Estimate:
        """Differences paired by seed."""
        return Estimate(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))

    def format(self, digits: int = 1) -> str:
        """`80.8 ± 1.9`, the mean and half of the interval's width; the mean alone for a single value."""
        mean = f"{self.mean:.{digits}f}"
        return mean if self.interval is None else f"{mean} ± {self.interval[1] - self.mean:.{digits}f}"
