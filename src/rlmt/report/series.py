"""Series of logged metrics: read from metrics.csv, and averaged over the first and the last steps."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MIN_STEPS = 10
"""Steps from which on a run is judged."""
_SHARE, _FEWEST = 5, 5


@dataclass(frozen=True)
class Series:
    """The finite values of one metric."""

    steps: Array
    """[n] Step numbers, ascending."""
    values: Array
    """[n] Values."""

    def __len__(self) -> int:
        return len(self.values)

    @property
    def window(self) -> int:
        """Values at either end that are averaged: a fifth of all, at least five."""
        return min(len(self), max(_FEWEST, len(self) // _SHARE))

    @property
    def first(self) -> Array:
        """The values of the first window."""
        return self.values[: self.window]

    @property
    def last(self) -> Array:
        """The values of the last window."""
        return self.values[len(self) - self.window :]


Metrics = Mapping[str, Series]
"""Name of a metric → its series."""


def read_metrics(path: Path) -> dict[str, Series]:
    """Reads the series of metrics.csv.

    Args:
        path: The file.

    Returns:
        Metric → series. Empty cells and values that are not finite are left out; a step that was logged twice has its
        last value.
    """
    points: dict[str, dict[float, float]] = {}
    for row in read_lines(path):
        step = _number(row.get("step", ""))
        if step is None:
            continue
        for name, cell in row.items():
            value = _number(cell)
            if value is not None and name not in ("step", "epoch"):
                points.setdefault(name, {})[step] = value
    return {name: _series(points[name]) for name in sorted(points)}


def read_lines(path: Path) -> list[dict[str, str]]:
    """Reads the cells of metrics.csv by column; a last line without its end, which a run is writing, is left out."""
    text = path.read_text(encoding="utf-8")
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return [row for row in rows if None not in row and None not in row.values()]


def _series(points: Mapping[float, float]) -> Series:
    steps = sorted(points)
    return Series(np.array(steps, dtype=np.float64), np.array([points[step] for step in steps], dtype=np.float64))


def _number(cell: str) -> float | None:
    """A finite number; None for anything else."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
