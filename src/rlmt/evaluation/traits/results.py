"""The result of a trait analysis: shares of the prompts with intervals, as a table, JSON, parquet and a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from rich.markup import escape
from rich.table import Table

from rlmt.checkpointing.files import atomic_write
from rlmt.evaluation.compare.pairs import Pair
from rlmt.evaluation.statistics import Interval, bootstrap_mean
from rlmt.evaluation.traits.questions import Trait

OUTCOMES = ("a", "tie", "b")
"""Verdicts, in the order of tables and bars."""

Winners = Sequence[str | None]
"""The verdict on each pair, None where none can be read."""


@dataclass(frozen=True)
class TraitResult:
    """How often a trait is shown more by A, by B, or by both alike."""

    trait: Trait
    shares: dict[str, Interval]
    """Share of the prompts by outcome."""
    difference: Interval
    """Share of A less that of B."""
    judged: int
    """Prompts with a verdict."""
    unparsed: int
    """Prompts without one, which are left out."""

    def to_json(self) -> dict[str, Any]:
        """JSON values by name."""
        shares = {outcome: share.to_json() for outcome, share in self.shares.items()}
        counts = {"judged": self.judged, "unparsed": self.unparsed}
        return self.trait.to_json() | {"shares": shares, "difference": self.difference.to_json()} | counts


def trait_result(trait: Trait, winners: Winners, seed: int) -> TraitResult:
    """Computes shares with 95 % intervals over prompts.

    Args:
        trait: The trait.
        winners: The verdict on each pair.
        seed: Seed of the resamples.
    """

    def share(values: dict[str, float]) -> Interval:
        return bootstrap_mean([math.nan if w is None else values.get(w, 0.0) for w in winners], seed=seed)

    unparsed = sum(winner is None for winner in winners)
    return TraitResult(
        trait,
        {outcome: share({outcome: 1.0}) for outcome in OUTCOMES},
        share({"a": 1.0, "b": -1.0}),
        len(winners) - unparsed,
        unparsed,
    )


def headings(names: tuple[str, str]) -> list[str]:
    """The head of the table."""
    return ["trait", f"{names[0]} [95 %]", "tie [95 %]", f"{names[1]} [95 %]", "difference [95 %]", "prompts"]


def cells(result: TraitResult) -> list[str]:
    """One row of the table, in per cent."""
    shares = [result.shares[outcome].format(scale=100) for outcome in OUTCOMES]
    return [result.trait.name, *shares, result.difference.format(scale=100, sign=True), f"{result.judged:,}"]


def terminal_table(results: Sequence[TraitResult], names: tuple[str, str]) -> Table:
    """The table for a terminal."""
    table = Table(box=None, pad_edge=False)
    for number, heading in enumerate(headings(names)):
        table.add_column(escape(heading), justify="right" if number else "left")
    for result in results:
        table.add_row(*map(escape, cells(result)))
    return table


def markdown(results: Sequence[TraitResult], names: tuple[str, str], notes: Sequence[str], figure: str) -> str:
    """The report: table, notes, the traits' descriptions and the figure."""
    rows = [headings(names), *map(cells, results)]
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    parts = [
        f"# Planning traits of {names[0]} and {names[1]}",
        "",
        head,
        "|---|" + "---:|" * (len(rows[0]) - 1),
        *body,
        "",
    ]
    parts += [f"- {note}" for note in notes] + ["", f"![Shares of the prompts]({figure})", ""]
    parts += [f"- **{result.trait.name}**: {result.trait.description}" for result in results]
    return "\n".join(parts) + "\n"


def write_verdicts(traits: Sequence[Trait], pairs: Sequence[Pair], winners: Sequence[Winners], path: Path) -> None:
    """Writes a row per trait and prompt: `trait`, `prompt` (row number from 0), `winner` (a, b, tie or null)."""
    rows = [
        {"trait": trait.name, "prompt": pair.prompt.index, "winner": winner}
        for trait, verdicts in zip(traits, winners, strict=True)
        for pair, winner in zip(pairs, verdicts, strict=True)
    ]
    schema = pyarrow.schema([("trait", pyarrow.string()), ("prompt", pyarrow.int64()), ("winner", pyarrow.string())])
    with atomic_write(path) as unfinished:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), unfinished)


def write_json(values: dict[str, Any], path: Path) -> None:
    """Writes JSON."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def draw_traits(results: Sequence[TraitResult], names: tuple[str, str], path: Path) -> Path:
    """Draws a horizontal bar per trait: the shares of A, tie and B, as figure 4 of the paper but with ties.

    Args:
        results: Results, from top to bottom.
        names: Names of A and B.
        path: PNG file.
    """
    # Imported here because matplotlib takes a second to load.
    from rlmt.report.style import BLUE, GREY, GRID_GREY, ORANGE, TITLE_COLOUR, new_figure, save_png

    figure = new_figure(8.0, 1.5 + 0.42 * len(results))
    axes = figure.subplots()
    labels = dict(zip(OUTCOMES, (names[0], "tie", names[1]), strict=True))
    colours = dict(zip(OUTCOMES, (BLUE, GRID_GREY, ORANGE), strict=True))
    rows = list(range(len(results)))[::-1]
    left = [0.0] * len(results)
    for outcome in OUTCOMES:
        widths = [100 * result.shares[outcome].value for result in results]
        axes.barh(rows, widths, left=left, height=0.68, color=colours[outcome], label=labels[outcome])
        for row, start, width in zip(rows, left, widths, strict=True):
            if width >= 6:
                colour = GREY if outcome == "tie" else "white"
                axes.text(start + width / 2, row, f"{width:.0f}", ha="center", va="center", fontsize=8.5, color=colour)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.axvline(50, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_yticks(rows, [result.trait.name for result in results], fontsize=9, color=TITLE_COLOUR)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the prompts whose thought shows the trait more", fontsize=9, color=GREY)
    axes.tick_params(axis="x", labelsize=8.5, colors=GREY, length=3)
    axes.tick_params(axis="y", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return save_png(figure, path)
