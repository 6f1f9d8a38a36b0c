"""The summary of a set of demonstrations: a table and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from rlmt.distill.rows import Row
from rlmt.endpoints import Meter

Lengths = dict[str, list[int]]
"""Words of each thought and of each response."""


def word_counts(rows: Sequence[Row]) -> Lengths:
    """Words of the thoughts and responses of accepted rows."""
    last = [row.attempts[-1] for row in rows if row.accepted]
    return {
        "thought": [len(attempt.thought.split()) for attempt in last],
        "response": [len(attempt.response.split()) for attempt in last],
    }


def summary_lines(rows: Sequence[Row], missing: int, meter: Meter) -> list[tuple[str, str]]:
    """Name and value of each line of the table.

    Args:
        rows: Finished rows.
        missing: Prompts that were not finished.
        meter: Tokens and cost.
    """
    accepted = [row for row in rows if row.accepted]
    reasons = Counter(row.attempts[-1].reason for row in rows if not row.accepted)
    second = sum(len(row.attempts) > 1 for row in accepted)
    lines = [("demonstrations", f"{len(accepted):,}"), ("after more than one answer", f"{second:,}")]
    lines += [(f"rejected: {reason}", f"{count:,}") for reason, count in reasons.most_common()]
    lines += [("not finished", f"{missing:,}")] if missing else []
    for name, counts in word_counts(rows).items():
        if counts:
            middle, high = np.percentile(counts, [50, 95])
            lines.append((f"{name} in words: mean, median, p95", f"{np.mean(counts):.0f}, {middle:.0f}, {high:.0f}"))
    usage = meter.usage
    lines.append(("tokens: prompts, answers", f"{usage.prompt_tokens:,}, {usage.completion_tokens:,}"))
    if (cost := meter.cost) is not None:
        lines.append(("cost", f"US$ {cost:.2f}"))
    return lines


def terminal_table(lines: Sequence[tuple[str, str]]) -> Table:
    """The table for a terminal."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in lines:
        table.add_row(escape(name), value)
    return table


def write_summary(lines: Sequence[tuple[str, str]], lengths: Lengths, path: Path) -> list[Path]:
    """Writes the table as Markdown and, if there are demonstrations, a histogram of their lengths.

    Args:
        lines: Lines of the table.
        lengths: Words of thoughts and responses.
        path: File of the demonstrations; the names of both files start with its stem.

    Returns:
        Paths of the written files.
    """
    table = path.with_name(f"{path.stem}.summary.md")
    picture = path.with_name(f"{path.stem}.png")
    text = "| | |\n|---|---:|\n" + "".join(f"| {name} | {value} |\n" for name, value in lines)
    if not any(lengths.values()):
        table.write_text(text, encoding="utf-8")
        return [table]
    table.write_text(f"{text}\n![Lengths]({picture.name})\n", encoding="utf-8")
    return [table, draw_lengths(lengths, picture)]


def draw_lengths(lengths: Lengths, path: Path) -> Path:
    """Draws a histogram of thought and response lengths, and returns its path."""
    # Imported here because matplotlib takes a second to load.
    from rlmt.report.style import BLUE, ORANGE, new_figure, save_png, style_panel

    figure = new_figure(7.4, 3.2)
    panels = figure.subplots(1, len(lengths), squeeze=False)[0]
    for axes, colour, (name, counts) in zip(panels, (ORANGE, BLUE), lengths.items(), strict=True):
        axes.hist(counts, bins=min(40, max(counts) - min(counts) + 1), color=colour)
        style_panel(axes, name.capitalize(), "demonstrations")
        axes.set_xlabel("words", fontsize=9)
    return save_png(figure, path)
