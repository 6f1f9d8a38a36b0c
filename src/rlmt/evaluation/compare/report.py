"""The report of a comparison: a table, sentences, and the prompts that were won and lost most clearly."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from rlmt.checkpointing.files import atomic_write
from rlmt.evaluation.compare.figures import Figures, Line, sentences
from rlmt.evaluation.compare.pairs import Pair
from rlmt.report.sections import fenced
from rlmt.rewards.prompt_text import conversation_text

SHOWN = 10
"""Most-won and most-lost prompts in the file."""
PRINTED = 3
"""Of these, how many are printed."""


@dataclass(frozen=True)
class Comparison:
    """All results of a comparison."""

    names: tuple[str, str]
    """Names of A and B."""
    pairs: Sequence[Pair]
    """n pairs."""
    lines: Sequence[Line]
    """Results by each judge and reward."""
    figures: Sequence[Figures]
    """The figures of each line."""
    settings: dict[str, Any]
    """What the comparison depends on, as JSON values."""

    @property
    def malformed(self) -> tuple[int, int]:
        """Number of malformed completions of A and of B."""
        return sum(not pair.first.ok for pair in self.pairs), sum(not pair.second.ok for pair in self.pairs)

    def ranked(self) -> list[int]:
        """Well-formed pairs that are no tie, from most won by A to most lost: by the first line, then by the next."""
        margins = np.nan_to_num(np.array([line.margins for line in self.lines]).reshape(len(self.lines), -1))
        rows = [n for n, pair in enumerate(self.pairs) if pair.well_formed and margins[:, n].any()]
        return sorted(rows, key=lambda row: (*(-margins[:, row]), self.pairs[row].prompt.index))

    def most(self, count: int) -> tuple[list[int], list[int]]:
        """Pairs that A won and lost most clearly by the first line that decides, at most `count` each."""
        rows = self.ranked()
        first = {row: next(m for line in self.lines if (m := line.margins[row]) and not math.isnan(m)) for row in rows}
        return [r for r in rows if first[r] > 0][:count], [r for r in reversed(rows) if first[r] < 0][:count]


def headings(names: tuple[str, str]) -> list[str]:
    """The head of the table."""
    a, b = names
    rates = [f"win rate of {a} [95 %]", "length-controlled [95 %]"]
    return ["by", f"{a} wins", "ties", f"{b} wins", *rates, f"score {a}", f"score {b}", "difference [95 %]", "pairs"]


def cells(figures: Figures) -> list[str]:
    """One row of the table."""
    shares = [f"{100 * share:.1f} %" for share in (figures.wins, figures.ties, figures.losses)]
    rates = [rate.format(scale=100) for rate in (figures.win_rate, figures.length_controlled)]
    scores = ["", "", ""]
    if figures.means is not None and figures.difference is not None:
        scores = [f"{mean:.2f}" for mean in figures.means] + [figures.difference.format(digits=2, sign=True)]
    return [figures.name, *shares, *rates, *scores, f"{figures.pairs:,}"]


def closing_sentences(comparison: Comparison) -> list[str]:
    """What the table says in words, one sentence or two a line."""
    lines = [sentence for figures in comparison.figures for sentence in sentences(figures, comparison.names)]
    total, counts = len(comparison.pairs), comparison.malformed
    counted = ", ".join(f"{name} {count:,}" for name, count in zip(comparison.names, counts, strict=True))
    lines.append(
        f"Malformed of {total:,}: {counted}."
        + (
            " A malformed completion loses against a well-formed one, two of them tie, none is judged."
            if any(counts)
            else ""
        )
    )
    return lines


def terminal_table(comparison: Comparison) -> Table:
    """The table for a terminal: turned on its side, since its ten columns do not fit into 80 characters."""
    table = Table(box=None, pad_edge=False)
    rows = zip(headings(comparison.names), *map(cells, comparison.figures), strict=True)
    for number, name in enumerate(next(rows)):
        table.add_column(escape(name), justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def short_list(comparison: Comparison) -> list[str]:
    """The start of the most-won and most-lost prompts, for a terminal."""
    lines = []
    for rows, what in zip(comparison.most(PRINTED), ("won", "lost"), strict=True):
        if rows:
            lines.append(f"most {what} by {comparison.names[0]}:")
        for row in rows:
            text = " ".join(conversation_text(comparison.pairs[row].prompt.messages).split())
            lines.append(f"  row {comparison.pairs[row].prompt.index + 1}: {text[:90]}{'…' if len(text) > 90 else ''}")
    return lines


def write_report(comparison: Comparison, out: Path) -> list[Path]:
    """Writes comparison.json and comparison.md, and returns their paths."""
    values = {
        "models": list(comparison.names),
        "prompts": len(comparison.pairs),
        "malformed": dict(zip(comparison.names, comparison.malformed, strict=True)),
        "lines": [figures.to_json() for figures in comparison.figures],
        "sentences": closing_sentences(comparison),
        "settings": comparison.settings,
    }
    texts = {
        "comparison.json": json.dumps(values, indent=2, ensure_ascii=False) + "\n",
        "comparison.md": markdown(comparison),
    }
    for name, text in texts.items():
        with atomic_write(out / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    return [out / name for name in texts]


def markdown(comparison: Comparison) -> str:
    """The whole report."""
    a, b = comparison.names
    parts = [f"# {a} against {b}", "", *_markdown_table(comparison), ""]
    parts += [f"- {sentence}" for sentence in closing_sentences(comparison)] + [""]
    won, lost = comparison.most(SHOWN)
    for rows, title in ((won, f"Most won by {a}"), (lost, f"Most lost by {a}")):
        if rows:
            parts += [f"## {title}", ""]
        for row in rows:
            parts += _pair_section(comparison, row)
    return "\n".join(parts)


def _markdown_table(comparison: Comparison) -> list[str]:
    rows = [headings(comparison.names), *map(cells, comparison.figures)]
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [head, "|---|" + "---:|" * (len(rows[0]) - 1), *body]


def _pair_section(comparison: Comparison, row: int) -> list[str]:
    """A prompt with both responses and its results."""
    pair = comparison.pairs[row]
    results = []
    for line in comparison.lines:
        result = {1.0: f"{comparison.names[0]} wins", 0.5: "tie", 0.0: f"{comparison.names[1]} wins"}.get(
            line.points[row]
        )
        if result is not None and line.scores is not None:
            result += f" ({line.scores[0][row]:.2f} against {line.scores[1][row]:.2f})"
        results.append(f"{line.name}: {result or 'no verdict'}")
    parts = [f"### Row {pair.prompt.index + 1}", "", "; ".join(results), ""]
    texts = {"Prompt": conversation_text(pair.prompt.messages)}
    texts |= {comparison.names[0]: pair.first.response, comparison.names[1]: pair.second.response}
    for title, text in texts.items():
        parts += [f"**{title}**", "", *fenced(text), ""]
    return parts
