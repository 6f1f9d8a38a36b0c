"""Whether a reward model is right as often as it says: σ(difference of scores) against how often the higher wins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from rlmt.report.curves import BLUE, GREY


@dataclass(frozen=True)
class Bin:
    """Pairs whose scores lie about equally far apart."""

    predicted: float
    """Mean probability that the model gives to its own choice, 0.5 to 1."""
    observed: float
    """How often its choice is the right one."""
    count: int
    """Pairs."""


def calibration_bins(differences: NDArray[np.float64], bins: int = 10) -> list[Bin]:
    """Sorts pairs by how sure the model is, and compares that with how often it is right.

    A pair and its mirror image say the same, so a pair stands for the side that the model prefers: it predicts
    σ(|difference|) that this side is the better one. Bins hold equally many pairs, up to one.

    Args:
        differences: [n] score of the better minus score of the worse response of each pair; 0 counts as half right.
        bins: most bins.

    Returns:
        Bins from the least sure to the surest, none of them empty.
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
    """Expected calibration error: the mean over pairs of |predicted - observed| of their bin."""
    return sum(b.count * abs(b.predicted - b.observed) for b in bins) / sum(b.count for b in bins)


def draw_calibration(path: Path, bins: list[Bin]) -> Path:
    """Draws observed against predicted accuracy into a PNG, with 95 % intervals by Wilson's score.

    Args:
        path: Where to; replaced in one go.
        bins: At least one.

    Returns:
        The path.
    """
    figure = Figure(figsize=(5.4, 5.2), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], ls="--", lw=1, color=GREY, label="as often right as it says")
    predicted, observed = [b.predicted for b in bins], [b.observed for b in bins]
    intervals = np.array([_wilson(b.observed, b.count) for b in bins])
    spread = np.abs(intervals.T - np.array(observed))
    axes.errorbar(
        predicted, observed, yerr=spread, fmt="o-", ms=5, lw=1.4, elinewidth=1, capsize=2, color=BLUE, label="pairs"
    )
    low = min(0.5, *(interval[0] for interval in intervals))
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(low - 0.02, 1.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("predicted: σ(|difference of scores|)", color=GREY)
    axes.set_ylabel("observed: preferred response is the better one", color=GREY)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    count = sum(b.count for b in bins)
    title = f"Calibration on {count:,} pairs, error {calibration_error(bins):.3f}"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color="#222222")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    figure.savefig(unfinished, format="png")
    unfinished.replace(path)
    return path


def _wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share seen in `count` cases (Wilson, 1927)."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return middle - half, middle + half
