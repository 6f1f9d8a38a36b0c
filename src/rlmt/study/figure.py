"""The picture of a study: what arms earn and how long they think, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlmt.report.curves import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, panel, smooth
from rlmt.study.results import Row

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
_TRAINING = (
    ("Reward while training", "reward/mean", "score"),
    ("Thought", "length/thought_mean", "tokens"),
    ("Response", "length/response_mean", "tokens"),
)
_KNOWN = ("val/thought_tokens", "val/response_tokens", "val/malformed")
"""Not drawn: lengths are in the upper row."""
_FIRST = "val/reward_mean"


def draw_study(path: Path, title: str, arms: Mapping[str, Sequence[Sequence[Row]]]) -> Path:
    """Draws training above and held-out prompts below, an arm a colour, into one PNG.

    Below, the reward that is trained on comes first and what it is not trained on after it: where the first goes on
    rising and the others fall, a run over-optimises.

    Args:
        path: Where to.
        title: Of the study.
        arms: Label → what each seed's run logged. Thin lines are seeds, thick ones their mean.

    Returns:
        The path.
    """
    logged = {name for seeds in arms.values() for rows in seeds for row in rows for name in row}
    held_out = sorted({name for name in logged if name.startswith("val/")} - {*_KNOWN, _FIRST})
    below = [("Reward, held-out prompts", _FIRST, "score")] if _FIRST in logged else []
    below += [(f"{name.removeprefix('val/')}, not trained on", name, "score") for name in held_out]
    columns = max(len(_TRAINING), len(below))
    figure = Figure(figsize=(3.7 * columns, 6.4), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, columns, squeeze=False)
    for axes, (heading, metric, unit) in [*zip(grid[0], _TRAINING, strict=False), *zip(grid[1], below, strict=False)]:
        for colour, (label, seeds) in zip(_COLOURS, arms.items(), strict=False):
            _curve(axes, [_points(rows, metric) for rows in seeds], label, colour)
        panel(axes, heading, unit)
        if metric.startswith("length/"):
            axes.set_ylim(bottom=0)
    for axes in [*grid[0][len(_TRAINING) :], *grid[1][len(below) :]]:
        axes.set_axis_off()
    grid[0][0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    figure.savefig(unfinished, format="png")
    unfinished.replace(path)
    return path


def _points(rows: Sequence[Row], metric: str) -> dict[int, float]:
    return {int(row["step"]): row[metric] for row in rows if metric in row and "step" in row}


def _curve(axes: Axes, seeds: Sequence[dict[int, float]], label: str, colour: str) -> None:
    drawn = [seed for seed in seeds if seed]
    if not drawn:
        return
    for points in drawn:
        axes.plot(list(points), list(points.values()), color=colour, alpha=0.35, linewidth=0.8)
    common = np.array(sorted(set.intersection(*(set(points) for points in drawn))), dtype=float)
    means = np.array([np.mean([points[int(step)] for points in drawn]) for step in common])
    # Held-out prompts are few points, each of many samples; training is many points, each of few.
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
