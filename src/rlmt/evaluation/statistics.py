"""95 % intervals of evaluation figures by bootstrap over prompts.

Scores of one prompt (three stories to a prompt, both orders of a comparison) are not independent, so whole groups of
rows are resampled. Two models that answered the same prompts are compared by resampling the prompts of both at once,
which removes what the prompts' difficulty adds to the spread.

Intervals are percentile intervals whose tails are widened for a small number of groups: a plain percentile interval of
the mean of n values is too narrow by the factor sqrt((n - 1) / n) and by the difference between the normal distribution
and Student's t (T. Hesterberg, "What Teachers Should Know about the Bootstrap", The American Statistician 69, 2015,
section 3.2). Where all groups have the same value, the interval has no width and says nothing about values not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
RESAMPLES = 2_000
"""Resamples of means, which take milliseconds."""
SLOW_RESAMPLES = 1_000
"""Resamples of figures that Python computes, such as length-controlled win rates."""

_CHUNK = 2_000_000
"""Number of resampled groups that are in memory at a time."""

Floats = NDArray[np.float64]
Groups = Sequence[str] | Sequence[int]
"""Group of each row: rows with equal values are resampled together."""


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; all are nan if the rows do not determine it, the ends alone for one group."""

    value: float
    """Figure of all rows."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""

    def format(self, digits: int = 1, scale: float = 1.0, sign: bool = False) -> str:
        """`54.2 [48.1, 60.3]`.

        Args:
            digits: Digits after the point.
            scale: Factor of all three, such as 100 for shares in per cent.
            sign: Whether positive numbers have a sign, as differences do.
        """
        value, low, high = (
            f"{scale * each:{'+' if sign else ''}.{digits}f}" for each in (self.value, self.low, self.high)
        )
        return f"{value} [{low}, {high}]"

    def to_json(self) -> dict[str, float | None]:
        """The three numbers as JSON values, null for nan."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, float | None]) -> Interval:
        """Reads what `to_json` returned."""
        return cls(**{name: math.nan if value is None else value for name, value in values.items()})


def bootstrap_mean(values: ArrayLike, groups: Groups | None = None, *, seed: int = 0) -> Interval:
    """The mean of values with its interval.

    Args:
        values: [n] Scores, nan where one is missing; missing ones are left out.
        groups: n groups; None makes each row a group.
        seed: Seed of the resamples.
    """
    column = np.asarray(values, dtype=np.float64)
    known = column[~np.isnan(column)]
    value = float(known.mean()) if known.size else math.nan
    return interval(
        value, resample_means(column, groups, seed=seed), len(column) if groups is None else len(set(groups))
    )


def paired_difference(first: ArrayLike, second: ArrayLike, groups: Groups | None = None, *, seed: int = 0) -> Interval:
    """The mean difference `first - second` of scores for the same prompts, with its interval.

    Args:
        first: [n] Scores of one model, nan where one is missing.
        second: [n] Scores of the other model for the same rows; a row with a missing score is left out.
        groups: n groups; None makes each row a group.
        seed: Seed of the resamples.
    """
    return bootstrap_mean(np.subtract(first, second, dtype=np.float64), groups, seed=seed)


def bootstrap(
    compute: Callable[[NDArray[np.int64]], ArrayLike], groups: Groups, *, resamples: int = SLOW_RESAMPLES, seed: int = 0
) -> list[Interval]:
    """Figures that a function computes from rows, with their intervals.

    Args:
        compute: Receives row numbers [m], repeated where a group was chosen more than once, and returns k figures, nan
            for those that the rows do not determine. For a paired difference it computes the figures of both models on
            the same rows.
        groups: n groups of the n rows.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        k intervals.
    """
    values, samples = resample(compute, groups, resamples=resamples, seed=seed)
    count = len(set(groups))
    return [interval(float(value), column, count) for value, column in zip(values, samples.T, strict=True)]


def resample(
    compute: Callable[[NDArray[np.int64]], ArrayLike], groups: Groups, *, resamples: int = SLOW_RESAMPLES, seed: int = 0
) -> tuple[Floats, Floats]:
    """Figures of all rows and of resampled groups; `interval` takes them.

    Args:
        compute: As for `bootstrap`.
        groups: n groups of the n rows. Calls with equal groups and seeds choose the same groups.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        [k] figures and their [resamples, k] resamples.
    """
    numbers = _group_numbers(groups)
    # The rows of group g are order[ends[g] - sizes[g] : ends[g]].
    order, sizes = np.argsort(numbers, kind="stable"), np.bincount(numbers)
    ends = np.cumsum(sizes)
    values = np.atleast_1d(np.asarray(compute(np.arange(len(numbers))), dtype=np.float64))
    generator = np.random.default_rng(seed)
    samples = np.empty((resamples, len(values)))
    for row in samples:
        chosen = generator.integers(len(sizes), size=len(sizes))
        row[:] = compute(np.concatenate([order[ends[group] - sizes[group] : ends[group]] for group in chosen]))
    return values, samples


def resample_means(
    values: ArrayLike, groups: Groups | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> Floats:
    """Means of resampled groups; `interval` takes them, or sums and differences of several of them.

    Args:
        values: [n] Scores, nan where one is missing; missing ones are left out.
        groups: n groups; None makes each row a group. Calls with equal groups and seeds choose the same groups.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        [resamples] means, nan where no chosen group has a value.
    """
    column = np.asarray(values, dtype=np.float64)
    numbers = np.arange(len(column)) if groups is None else _group_numbers(groups)
    known = ~np.isnan(column)
    sums = np.bincount(numbers, weights=np.where(known, column, 0.0))
    counts = np.bincount(numbers, weights=known)
    generator = np.random.default_rng(seed)
    samples = np.full(resamples, math.nan)
    step = max(1, _CHUNK // max(1, len(sums)))
    for start in range(0, resamples if len(sums) else 0, step):
        chosen = generator.integers(len(sums), size=(min(step, resamples - start), len(sums)))
        total, count = sums[chosen].sum(1), counts[chosen].sum(1)
        np.divide(total, count, out=samples[start : start + step], where=count > 0)
    return samples


def interval(value: float, samples: ArrayLike, groups: int) -> Interval:
    """The interval of a figure from its resamples.

    Args:
        value: Figure of all rows.
        samples: [resamples] The figure of each resample, nan where it is not determined; those are left out.
        groups: Number of groups.
    """
    from scipy.stats import norm, t  # takes a third of a second to import

    column = np.asarray(samples, dtype=np.float64)
    column = column[~np.isnan(column)]
    if math.isnan(value) or groups < 2 or not column.size:
        return Interval(value, math.nan, math.nan)
    tail = (1 - CONFIDENCE) / 2
    tail = float(norm.cdf(math.sqrt(groups / (groups - 1)) * t.ppf(tail, groups - 1)))
    low, high = np.quantile(column, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def _group_numbers(groups: Groups) -> NDArray[np.int64]:
    """The group of each row as a number, in the order of their values."""
    return np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1).astype(np.int64)
