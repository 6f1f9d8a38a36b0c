"""The figure of the distribution of thought and response lengths over the steps of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rlmt.report.style import BLUE, ORANGE, new_figure, save_png, style_panel

COLOURS = {"thought": BLUE, "response": ORANGE}


def draw_lengths(path: Path, steps: Sequence[int], lengths: Mapping[str, Sequence[Sequence[float]]]) -> Path:
    """Writes a PNG with the quantiles of thought and response lengths over the steps.

    Args:
        path: Output file, written atomically.
        steps: [n] Step numbers.
        lengths: `thought` and `response` → [n, 5] Quantiles of the lengths of a step in tokens, ascending: bounds of
            the outer band, of the inner band, and the median in the middle.

    Returns:
        The path.
    """
    figure = new_figure(11, 4.2)
    for axes, (part, colour) in zip(figure.subplots(1, 2), COLOURS.items(), strict=True):
        lowest, low, median, high, highest = np.asarray(lengths[part], dtype=np.float64).T
        axes.fill_between(steps, lowest, highest, color=colour, alpha=0.15, linewidth=0, label="middle 90 %")
        axes.fill_between(steps, low, high, color=colour, alpha=0.3, linewidth=0, label="middle 50 %")
        axes.plot(steps, median, color=colour, linewidth=1.5, marker="o" if len(steps) == 1 else None, label="median")
        style_panel(axes, f"Length of the {part}", "tokens per sample")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    return save_png(figure, path)
