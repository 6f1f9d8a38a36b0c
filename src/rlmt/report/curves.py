"""The figure of a run: rewards, lengths, malformed samples, KL and entropy over the rollout steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from rlmt.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE_GREY,
    PURPLE,
    RED,
    TITLE_COLOUR,
    new_figure,
    save_png,
    style_panel,
)

Array = NDArray[np.float64]
Curves = Mapping[str, Sequence[float]]
Label = tuple[str, float, str]
"""Text, value at the end of the labelled line, colour."""
Line = tuple[str, str, str, str]
"""Label, metric, colour, line style."""

LENGTHS: list[Line] = [
    ("thought p95", "length/thought_p95", BLUE, "--"),
    ("thought mean", "length/thought_mean", BLUE, "-"),
    ("response p95", "length/response_p95", ORANGE, "--"),
    ("response mean", "length/response_mean", ORANGE, "-"),
]
INVALID: list[Line] = [("malformed", "reward/malformed", RED, "-"), ("truncated", "length/truncated", PURPLE, "-")]
KL: list[Line] = [("KL", "policy/kl", GREEN, "-")]
ACCURACY: list[Line] = [("accuracy", "dpo/accuracy", GREEN, "-")]
ENTROPY: list[Line] = [("entropy", "policy/entropy", GREY, "-")]


def smooth(steps: Array, values: Array, width: float) -> Array:
    """Smooths values with a Gaussian kernel, which has no lag, unlike a running mean.

    Args:
        steps: [n] Steps in ascending order; gaps are allowed.
        values: [n] Values; NaNs are ignored.
        width: Standard deviation of the kernel, in steps.

    Returns:
        [n] Smoothed values, NaN where the values are NaN.
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
    """Writes a PNG with reward, lengths, malformed samples, entropy and KL (for DPO: accuracy) over the steps.

    Dots are single steps, lines are smoothed. Each held-out reward has a panel of its own below the reward, because
    rewards have different scales, and its best validation is marked: the run over-optimises where a held-out reward
    falls and the reward still rises.

    Args:
        path: Output file, written atomically.
        train: `step` and the metrics by name, one value per step; NaN where a metric was not logged.
        validation: `step`, `reward` and `val/<name>` for each held-out reward, one value per validation.
        subtitle: Description of the run.

    Returns:
        The path.
    """
    data = {name: np.asarray(values, dtype=np.float64) for name, values in train.items()}
    figure = new_figure(11, 7.4, layout=None)
    grid = figure.add_gridspec(2, 2, left=0.07, right=0.9, top=0.865, bottom=0.075, wspace=0.46, hspace=0.34)
    held_out = [name for name in validation if name.startswith("val/")]
    reward, *others = _stack(figure, grid[0, 0], [2] + [1] * len(held_out))
    length, invalid = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 0])
    kl, entropy = _stack(figure, grid[1, 1], [1, 1])
    last = max([data["step"][-1], data["step"][0] + 1, *validation["step"]])
    margin = 0.012 * (last - data["step"][0])
    for axes in (reward, *others, length, invalid, kl, entropy):
        axes.set_xlim(data["step"][0] - margin, last + margin)

    style_panel(reward, "Reward", "reward")
    for axes, name in zip(others, held_out, strict=True):
        style_panel(axes, "", "held-out")
        _label_ends(axes, _plot_held_out(axes, name, validation))
    _label_ends(reward, _plot_reward(reward, data, validation))
    _draw_lengths(length, data)
    _draw_invalid(invalid, data)
    _draw_kl(kl, data)
    style_panel(entropy, "", "entropy\n(nats per token)")
    _label_ends(entropy, _plot_lines(entropy, data, ENTROPY))
    for axes in (kl, *[reward, *others][:-1]):
        axes.tick_params(labelbottom=False)
        axes.set_xlabel("")
    figure.align_ylabels([reward, *others, invalid])
    figure.align_ylabels([length, kl, entropy])

    count = len(data["step"])
    title = f"RLMT run, {count} rollout step{'s' if count != 1 else ''}"
    figure.text(0.02, 0.955, title, fontsize=14, fontweight="bold", color=TITLE_COLOUR)
    subtitle += " · dots: each step, lines: smoothed"
    figure.text(0.02, 0.925, subtitle, fontsize=9.5, color=GREY, parse_math=False)
    return save_png(figure, path)


def _stack(figure: Figure, cell: SubplotSpec, heights: Sequence[int]) -> list[Axes]:
    """Stacks panels of the given relative heights in one cell of the grid."""
    rows = cell.subgridspec(len(heights), 1, hspace=0.22, height_ratios=heights)
    return [figure.add_subplot(rows[i]) for i in range(len(heights))]


def _draw_lengths(axes: Axes, data: Mapping[str, Array]) -> None:
    """Draws the panel of thought and response lengths."""
    style_panel(axes, "Length", "tokens per sample")
    labels = _plot_lines(axes, data, LENGTHS)
    axes.set_ylim(bottom=0)
    _label_ends(axes, labels)


def _draw_invalid(axes: Axes, data: Mapping[str, Array]) -> None:
    """Draws the panel of malformed and truncated samples."""
    style_panel(axes, "Malformed and truncated samples", "fraction of samples")
    labels = _plot_lines(axes, data, INVALID)
    axes.set_ylim(bottom=0, top=max(0.02, axes.get_ylim()[1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if axes.get_ylim()[1] > 0.1 else 1))
    _label_ends(axes, labels)


def _draw_kl(axes: Axes, data: Mapping[str, Array]) -> None:
    """Draws the panel of the KL divergence, or of the accuracy if the objective is DPO."""
    pairwise = not np.isnan(data["dpo/accuracy"]).all()
    if pairwise:
        style_panel(axes, "DPO accuracy and entropy", "accuracy")
    else:
        style_panel(axes, "KL to the reference and entropy", "KL\n(nats per token)")
    _label_ends(axes, _plot_lines(axes, data, ACCURACY if pairwise else KL))
    if pairwise:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _smoothing_width(steps: Array) -> float:
    """Standard deviation of the smoothing kernel: one fortieth of the run, at least one step."""
    return max(1.0, len(steps) / 40)


def _plot_reward(axes: Axes, data: Mapping[str, Array], validation: Curves) -> list[Label]:
    """Plots the mean reward, a band of its standard deviation within prompts, and the validation reward."""
    steps = data["step"]
    mean = smooth(steps, data["reward/mean"], _smoothing_width(steps))
    deviation = smooth(steps, data["reward/group_std"], _smoothing_width(steps))
    axes.fill_between(steps, mean - deviation, mean + deviation, color=BLUE, alpha=0.13, linewidth=0)
    labels = _plot_lines(axes, data, [("train mean", "reward/mean", BLUE, "-")])
    labels.append(("± std within\na prompt", float(mean[-1] - deviation[-1]), "#7f9fc6"))
    if validation["step"]:
        values = np.asarray(validation["reward"], dtype=np.float64)
        axes.plot(validation["step"], values, "D-", color=ORANGE, markersize=4.5, linewidth=1, zorder=4)
        labels.append(("validation", float(values[-1]), ORANGE))
    return labels


def _plot_held_out(axes: Axes, name: str, validation: Curves) -> list[Label]:
    """Plots one held-out reward and marks its best validation."""
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


def _plot_lines(axes: Axes, data: Mapping[str, Array], lines: Sequence[Line]) -> list[Label]:
    """Plots metrics as dots and smoothed lines, and returns the labels of the lines."""
    labels = []
    few = len(data["step"]) <= 50
    for label, metric, colour, style in lines:
        known = ~np.isnan(data[metric])
        if not known.any():
            continue
        steps, values = data["step"][known], data[metric][known]
        if style == "-":
            axes.scatter(steps, values, s=16 if few else 5, color=colour, alpha=0.4 if few else 0.28, linewidths=0)
        line = smooth(steps, values, _smoothing_width(data["step"]))
        # A line through a single step is invisible, so the step gets a marker.
        marker = "." if len(steps) == 1 else ""
        axes.plot(steps, line, color=colour, ls=style, lw=1.8 if style == "-" else 1.1, marker=marker, zorder=3)
        labels.append((label, float(line[-1]), colour))
    if not labels:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=PALE_GREY)
        axes.set_yticks([])
    return labels


def _label_ends(axes: Axes, labels: Sequence[Label]) -> None:
    """Writes each label beside the right end of its line, and moves labels apart that would overlap."""
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
