"""Colours, panel style and PNG output of all figures.

Figures are made of matplotlib objects and never with pyplot, whose figures are global state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2f6db3", "#d9781c", "#2c8f58", "#c23b3b", "#7a55a8", "#555555"
"""Colours that colour-blind readers can distinguish, in greyscale print too."""
TITLE_COLOUR = "#222222"
PALE_GREY = "#aaaaaa"
GRID_GREY = "#e4e4e4"


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """Makes an empty white figure of 150 dots per inch; width and height are in inches."""
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: Path) -> Path:
    """Writes a figure atomically, so that a viewer never reads a truncated file, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
    return path


def style_panel(axes: Axes, title: str, unit: str) -> None:
    """Sets the title of a panel, the unit of its values, and the style that all panels share."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=TITLE_COLOUR, pad=8)
    axes.set_ylabel(unit, fontsize=9, color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("rollout step", fontsize=9, color=GREY)
    axes.tick_params(labelsize=8.5, colors=GREY, length=3)
    axes.grid(axis="y", color=GRID_GREY, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(PALE_GREY)
