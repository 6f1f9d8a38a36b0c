"""The picture of a reward model's calibration."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.ticker import PercentFormatter

from rlmt.report.style import BLUE, GREY, GRID_GREY, TITLE_COLOUR, new_figure, save_png
from rlmt.rewards.calibration import Bin, calibration_error


def draw_calibration(path: Path, bins: list[Bin]) -> Path:
    """Writes a PNG with observed against predicted accuracy, and 95 % Wilson score intervals.

    Args:
        path: Output file, written atomically.
        bins: At least one bin.

    Returns:
        The path.
    """
    figure = new_figure(5.4, 5.2)
    axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], ls="--", lw=1, color=GREY, label="perfect calibration")
    predicted, observed = [b.predicted for b in bins], [b.observed for b in bins]
    intervals = np.array([_wilson_interval(b.observed, b.count) for b in bins])
    errors = np.abs(intervals.T - np.array(observed))
    axes.errorbar(
        predicted, observed, yerr=errors, fmt="o-", ms=5, lw=1.4, elinewidth=1, capsize=2, color=BLUE, label="pairs"
    )
    low = min(0.5, *(interval[0] for interval in intervals))
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(low - 0.02, 1.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("predicted: σ(|difference of scores|)", color=GREY)
    axes.set_ylabel("observed: preferred response is the better one", color=GREY)
    axes.grid(color=GRID_GREY, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    count = sum(b.count for b in bins)
    title = f"Calibration on {count:,} pairs, error {calibration_error(bins):.3f}"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=TITLE_COLOUR)
    return save_png(figure, path)


def _wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a proportion over `count` observations (Wilson, 1927)."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return middle - half, middle + half
