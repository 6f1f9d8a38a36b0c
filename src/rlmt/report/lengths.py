"""The picture of how lengths are distributed over a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlmt.report.curves import BLUE, ORANGE, panel

COLOURS = {"thought": BLUE, "response": ORANGE}


def draw_lengths(path: Path, steps: Sequence[int], lengths: Mapping[str, Sequence[Sequence[float]]]) -> Path:
    """Draws the quantiles of lengths over the steps of a run into one PNG, which is replaced atomically.

    Args:
        path: File to write.
        steps: [n] numbers of the steps.
        lengths: `thought` and `response` → [n, 5] quantiles of the lengths of a step in tokens, ascending: the outer
            band, the inner band and the median between them.

    Returns:
        The path.
    """
    figure = Figure(figsize=(11, 4.2), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (part, colour) in zip(figure.subplots(1, 2), COLOURS.items(), strict=True):
        lowest, low, median, high, highest = np.asarray(lengths[part], dtype=np.float64).T
        axes.fill_between(steps, lowest, highest, color=colour, alpha=0.15, linewidth=0, label="middle 90 %")
        axes.fill_between(steps, low, high, color=colour, alpha=0.3, linewidth=0, label="middle 50 %")
        axes.plot(steps, median, color=colour, linewidth=1.5, marker="o" if len(steps) == 1 else None, label="median")
        panel(axes, f"Length of the {part}", "tokens per sample")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    figure.savefig(unfinished, format="png")
    unfinished.replace(path)
    return path
