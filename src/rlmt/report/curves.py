"""The picture of a run. Drawn with matplotlib's objects, never with pyplot, whose figures are global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2f6db3", "#d9781c", "#2c8f58", "#c23b3b", "#7a55a8", "#555555"
"""Colours that stay apart for colour-blind readers and in grey print."""

Array = NDArray[np.float64]
Curves = Mapping[str, Sequence[float]]
Label = tuple[str, float, str]
"""Text, height of the line it names, colour."""

LENGTHS = [
    ("thought p95", "length/thought_p95", BLUE, "--"),
    ("thought mean", "length/thought_mean", BLUE, "-"),
    ("response p95", "length/response_p95", ORANGE, "--"),
    ("response mean", "length/response_mean", ORANGE, "-"),
]
BROKEN = [("malformed", "reward/malformed", RED, "-"), ("truncated", "length/truncated", PURPLE, "-")]
KL = [("KL", "policy/kl", GREEN, "-")]
ACCURACY = [("accuracy", "dpo/accuracy", GREEN, "-")]
"""Label, metric, colour and line style of the lines in a panel."""


def smooth(steps: Array, values: Array, width: float) -> Array:
    """Gaussian-weighted mean of the neighbouring steps: it does not lag, as a running mean would.

    Args:
        steps: [n] ascending steps; gaps are allowed.
        values: [n] values; NaNs are left out.
        width: Standard deviation of the weights, in steps.

    Returns:
        [n] smoothed values, NaN where the values are.
    """
    known = ~np.isnan(values)
    out = np.full_like(values, np.nan)
    at = steps[known]
    for i in np.flatnonzero(known):
        near = slice(np.searchsorted(at, steps[i] - 4 * width), np.searchsorted(at, steps[i] + 4 * width, "right"))
        weights = np.exp(-0.5 * ((at[near] - steps[i]) / width) ** 2)
        out[i] = weights @ values[known][near] / weights.sum()
    return out


def draw_curves(path: Path, train: Curves, validation: Curves, subtitle: str) -> Path:
    """Draws reward, lengths, malformed samples, KL (or, for pairs, accuracy) and entropy over the steps into one PNG.

    Dots are steps, lines are smoothed. The file is replaced in one go, so a viewer never sees half of it.

    Args:
        path: Where to.
        train: `step` and the metrics under their names, each one value a step; NaN where there is none.
        validation: `step`, `reward` and, of any held-out rewards, `val/<name>`, one value a validation. Each held-out
            reward has a panel of its own below the reward's, as no two have one scale, and its best validation marked:
            where its curve turns while the reward goes on rising, the run over-optimises.
        subtitle: What kind of run this is.

    Returns:
        The path.
    """
    data = {name: np.asarray(values, dtype=np.float64) for name, values in train.items()}
    figure = Figure(figsize=(11, 7.4), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, left=0.07, right=0.9, top=0.865, bottom=0.075, wspace=0.46, hspace=0.34)
    held_out = [name for name in validation if name.startswith("val/")]
    reward, *others = _stack(figure, grid[0, 0], [2] + [1] * len(held_out))
    length, broken = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 0])
    kl, entropy = _stack(figure, grid[1, 1], [1, 1])
    last = max([data["step"][-1], data["step"][0] + 1, *validation["step"]])
    margin = 0.012 * (last - data["step"][0])
    for axes in (reward, *others, length, broken, kl, entropy):
        axes.set_xlim(data["step"][0] - margin, last + margin)

    panel(reward, "Reward", "reward")
    panel(length, "Length", "tokens a sample")
    panel(broken, "Broken samples", "share of samples")
    pairwise = not np.isnan(data["dpo/accuracy"]).all()
    if pairwise:
        panel(kl, "Pairs ranked as the reward does, and entropy", "accuracy")
    else:
        panel(kl, "KL to the reference and entropy", "KL\n(nats a token)")
    panel(entropy, "", "entropy\n(nats a token)")
    for axes, name in zip(others, held_out, strict=True):
        panel(axes, "", "held-out")
        _label_ends(axes, _held_out(axes, name, validation))
    for axes in (kl, *[reward, *others][:-1]):
        axes.tick_params(labelbottom=False)
        axes.set_xlabel("")

    _label_ends(reward, _reward(reward, data, validation))
    labels = _lines(length, data, LENGTHS)
    length.set_ylim(bottom=0)
    _label_ends(length, labels)
    labels = _lines(broken, data, BROKEN)
    broken.set_ylim(bottom=0, top=max(0.02, broken.get_ylim()[1]))
    broken.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if broken.get_ylim()[1] > 0.1 else 1))
    _label_ends(broken, labels)
    _label_ends(kl, _lines(kl, data, ACCURACY if pairwise else KL))
    if pairwise:
        kl.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _label_ends(entropy, _lines(entropy, data, [("entropy", "policy/entropy", GREY, "-")]))
    figure.align_ylabels([reward, *others, broken])
    figure.align_ylabels([length, kl, entropy])

    count = len(data["step"])
    title = f"RLMT run, {count} rollout step{'s' if count != 1 else ''}"
    figure.text(0.02, 0.955, title, fontsize=14, fontweight="bold", color="#222222")
    subtitle += " · dots: each step, lines: smoothed"
    figure.text(0.02, 0.925, subtitle, fontsize=9.5, color=GREY, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    figure.savefig(unfinished, format="png")
    unfinished.replace(path)
    return path


def _width(steps: Array) -> float:
    """How far to smooth: over one fortieth of the run, at least one step."""
    return max(1.0, len(steps) / 40)


def _reward(axes: Axes, data: Mapping[str, Array], validation: Curves) -> list[Label]:
    steps = data["step"]
    mean = smooth(steps, data["reward/mean"], _width(steps))
    spread = smooth(steps, data["reward/group_std"], _width(steps))
    axes.fill_between(steps, mean - spread, mean + spread, color=BLUE, alpha=0.13, linewidth=0)
    labels = _lines(axes, data, [("train mean", "reward/mean", BLUE, "-")])
    labels.append(("± std within\na prompt", float(mean[-1] - spread[-1]), "#7f9fc6"))
    if validation["step"]:
        held_out = np.asarray(validation["reward"], dtype=np.float64)
        axes.plot(validation["step"], held_out, "D-", color=ORANGE, markersize=4.5, linewidth=1, zorder=4)
        labels.append(("validation", float(held_out[-1]), ORANGE))
    return labels


def _stack(figure: Figure, cell: SubplotSpec, heights: Sequence[int]) -> list[Axes]:
    """One panel above the other in a cell of the grid."""
    rows = cell.subgridspec(len(heights), 1, hspace=0.22, height_ratios=heights)
    return [figure.add_subplot(rows[i]) for i in range(len(heights))]


def _held_out(axes: Axes, name: str, validation: Curves) -> list[Label]:
    steps, values = (np.asarray(validation[key], dtype=np.float64) for key in ("step", name))
    known = ~np.isnan(values)
    if not known.any():
        return []
    steps, values = steps[known], values[known]
    best = int(values.argmax())
    axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(y=0.15)
    axes.plot(steps, values, "D-", color=GREEN, markersize=3.5, linewidth=1, zorder=4)
    axes.plot(steps[best], values[best], "o", ms=9, markerfacecolor="none", markeredgecolor=GREEN, clip_on=False)
    return [(f"{name.removeprefix('val/')}\nbest: step {steps[best]:.0f}", float(values[-1]), GREEN)]


def panel(axes: Axes, title: str, unit: str) -> None:
    """Gives a panel its title, the unit of its values, and the style that all panels share."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color="#222222", pad=8)
    axes.set_ylabel(unit, fontsize=9, color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("rollout step", fontsize=9, color=GREY)
    axes.tick_params(labelsize=8.5, colors=GREY, length=3)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#aaaaaa")


def _lines(axes: Axes, data: Mapping[str, Array], lines: Sequence[tuple[str, str, str, str]]) -> list[Label]:
    """Draws (label, metric, colour, line style) as dots and a smoothed line; returns the lines' labels."""
    labels = []
    few = len(data["step"]) <= 50
    for label, metric, colour, style in lines:
        known = ~np.isnan(data[metric])
        if not known.any():
            continue
        steps, values = data["step"][known], data[metric][known]
        if style == "-":
            axes.scatter(steps, values, s=16 if few else 5, color=colour, alpha=0.4 if few else 0.28, linewidths=0)
        line = smooth(steps, values, _width(data["step"]))
        # A single step has no line to show, so its point is drawn for one.
        marker = "." if len(steps) == 1 else ""
        axes.plot(steps, line, color=colour, ls=style, lw=1.8 if style == "-" else 1.1, marker=marker, zorder=3)
        labels.append((label, float(line[-1]), colour))
    if not labels:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="#aaaaaa")
        axes.set_yticks([])
    return labels


def _label_ends(axes: Axes, labels: Sequence[Label]) -> None:
    """Names each line beside its right end, pushed apart where two ends are too close."""
    low, high = axes.get_ylim()
    height_pt = axes.get_window_extent().height / axes.figure.dpi * 72
    ordered = sorted(labels, key=lambda item: item[1])
    size = [11.5 * (1 + label.count("\n")) / height_pt for label, _, _ in ordered]
    at = [(value - low) / (high - low) for _, value, _ in ordered]
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + (size[i] + size[i - 1]) / 2)
    for i in reversed(range(len(at))):
        ceiling = 1.0 if i == len(at) - 1 else at[i + 1] - (size[i] + size[i + 1]) / 2
        at[i] = min(at[i], ceiling)
    for (label, _, colour), height in zip(ordered, at, strict=True):
        axes.text(
            1.02, height, label, transform=axes.transAxes, color=colour, fontsize=8.5, va="center", linespacing=1.1
        )
