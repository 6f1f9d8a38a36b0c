"""The figure of a study: rewards and lengths of several arms over the training steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from rlmt.report.curves import smooth
from rlmt.report.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, new_figure, save_png, style_panel
from rlmt.study.results import Row

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
_TRAINING = (
    ("Reward while training", "reward/mean", "score"),
    ("Thought", "length/thought_mean", "tokens"),
    ("Response", "length/response_mean", "tokens"),
)
"""Title, metric and unit of the panels in the upper row."""
_OMITTED = ("val/thought_tokens", "val/response_tokens", "val/malformed")
"""Validation metrics without a panel; the upper row shows the lengths."""
_VALIDATION_REWARD = "val/reward_mean"


def draw_study(path: Path, title: str, arms: Mapping[str, Sequence[Sequence[Row]]]) -> Path:
    """Writes one PNG with training metrics in the upper row and validation metrics in the lower row.

    The lower row starts with the training reward on held-out prompts, followed by the held-out rewards. A run
    over-optimises where the training reward still rises and the others fall.

    Args:
        path: Output file.
        title: Title of the study.
        arms: Label → the logged rows of each seed. Each arm has one colour: thin lines are seeds, thick ones their
            mean.

    Returns:
        The path.
    """
    logged = {name for seeds in arms.values() for rows in seeds for row in rows for name in row}
    held_out = sorted({name for name in logged if name.startswith("val/")} - {*_OMITTED, _VALIDATION_REWARD})
    lower = [("Reward, held-out prompts", _VALIDATION_REWARD, "score")] if _VALIDATION_REWARD in logged else []
    lower += [(f"{name.removeprefix('val/')}, not trained on", name, "score") for name in held_out]
    columns = max(len(_TRAINING), len(lower))
    figure = new_figure(3.7 * columns, 6.4)
    grid = figure.subplots(2, columns, squeeze=False)
    for axes, (heading, metric, unit) in [*zip(grid[0], _TRAINING, strict=False), *zip(grid[1], lower, strict=False)]:
        for colour, (label, seeds) in zip(_COLOURS, arms.items(), strict=False):
            _plot_arm(axes, [_values_by_step(rows, metric) for rows in seeds], label, colour)
        style_panel(axes, heading, unit)
        if metric.startswith("length/"):
            axes.set_ylim(bottom=0)
    for axes in [*grid[0][len(_TRAINING) :], *grid[1][len(lower) :]]:
        axes.set_axis_off()
    grid[0][0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return save_png(figure, path)


def _values_by_step(rows: Sequence[Row], metric: str) -> dict[int, float]:
    """Step → value of a metric."""
    return {int(row["step"]): row[metric] for row in rows if metric in row and "step" in row}


def _plot_arm(axes: Axes, seeds: Sequence[dict[int, float]], label: str, colour: str) -> None:
    """Plots a thin line for each seed, and their mean over the steps that all seeds have."""
    nonempty = [seed for seed in seeds if seed]
    if not nonempty:
        return
    for points in nonempty:
        axes.plot(list(points), list(points.values()), color=colour, alpha=0.35, linewidth=0.8)
    common = np.array(sorted(set.intersection(*(set(points) for points in nonempty))), dtype=float)
    means = np.array([np.mean([points[int(step)] for points in nonempty]) for step in common])
    # Validation has few points, each the mean of many samples; training has many points, each of few samples.
    few = len(common) <= 20
    axes.plot(
        common,
        means if few else smooth(common, means, len(common) / 40),
        "o-" if few else "-",
        color=colour,
        linewidth=2,
        markersize=4,
        label=label,
    )
