"""What runs logged, and what it says over seeds: means, and differences paired by seed, with 95 % intervals."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import t as student

from rlmt.errors import UserError

Row = dict[str, float]
"""Metric → value, of one line of metrics.csv; only what was logged there."""

CONFIDENCE = 0.95


def read_rows(folder: Path) -> list[Row]:
    """All lines that a job's runs logged, in order; what a resumed run logged again counts once, as the last said it.

    Args:
        folder: a job's folder, with a `version_N/metrics.csv` for each time it was started.

    Raises:
        UserError: there is none.
    """
    files = sorted(folder.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.rpartition("_")[2]))
    if not files:
        raise UserError(f"{folder}: holds no version_*/metrics.csv, so there is nothing to report of it")
    rows: list[Row] = []
    for path in files:
        with path.open(encoding="utf-8", newline="") as file:
            fresh = [{name: float(cell) for name, cell in line.items() if cell} for line in csv.DictReader(file)]
        first = min((row["step"] for row in fresh if "step" in row), default=math.inf)
        rows = [row for row in rows if row.get("step", -1) < first] + fresh
    return rows


def last_values(rows: Sequence[Row], metrics: dict[str, str], where: Path) -> dict[str, float]:
    """The last value of each metric.

    Args:
        rows: what was logged.
        metrics: name → the name that it was logged under.
        where: the job's folder, for messages.

    Raises:
        UserError: a metric was never logged.
    """
    found = {}
    for name, logged in metrics.items():
        values = [row[logged] for row in rows if logged in row]
        if not values:
            raise UserError(f"{where}: no {logged} was logged, which the study's metric {name!r} asks for")
        found[name] = values[-1]
    return found


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    values: tuple[float, ...]
    """One a seed."""

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's 95 % interval of the mean; None for a single seed."""
        n = len(self.values)
        if n < 2:
            return None
        half = float(student.ppf(0.5 + CONFIDENCE / 2, n - 1)) * statistics.stdev(self.values) / math.sqrt(n)
        return self.mean - half, self.mean + half

    def minus(self, other: Estimate) -> Estimate:
        """The differences, seed by seed."""
        return Estimate(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))

    def write(self, digits: int = 1) -> str:
        """`80.8 ± 1.9`, the mean and half of its interval; the mean alone where there is none."""
        mean = f"{self.mean:.{digits}f}"
        return mean if self.interval is None else f"{mean} ± {self.interval[1] - self.mean:.{digits}f}"
