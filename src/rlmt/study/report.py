"""The report of a study: sections for the terminal, report.md and the page, and the numbers as files."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from rlmt.report.sections import Picture, Section, Table, fenced, plain
from rlmt.study.findings import Findings, comparison_sentences, seeds_text, unfinished

_MOST_COLUMNS = 9
"""Columns that fit side by side in a terminal; wider tables are shown with rows and columns exchanged."""


def make_sections(findings: Findings) -> list[Section]:
    """The contents of the report; texts are Markdown.

    Args:
        findings: What the report shows.
    """
    figure = findings.figure
    found = [
        Section("Results", _notes(findings), _result_tables(findings)),
        Section("Differences", [f"- {sentence}" for sentence in comparison_sentences(findings)]),
        *([_by_seed(findings)] if findings.table and len(findings.seeds) > 1 else []),
        *findings.analyses,
        Section("Answers to the same prompts", findings.samples),
        Section("Curves", pictures=[Picture(figure, f"Curves of {findings.title}")] if figure else []),
        Section("What comes next", _closing_lines(findings)),
    ]
    return [section for section in found if section.texts or section.tables or section.pictures]


def write_report(findings: Findings, sections: Sequence[Section], out: Path) -> list[Path]:
    """Writes report.md, summary.json and results.csv.

    Args:
        findings: What the report shows.
        sections: Its sections.
        out: Folder of the study.

    Returns:
        The written files.
    """
    summary = {
        arm: {metric: None if math.isnan(estimate.mean) else estimate.mean for metric, estimate in row.items()}
        for arm, row in findings.table.items()
    }
    files = {
        "report.md": _markdown(findings.title, sections, out),
        "summary.json": json.dumps(summary, indent=2) + "\n",
    }
    for name, content in files.items():
        (out / name).write_text(content, encoding="utf-8")
    with (out / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        columns = sorted({name for rows in findings.provenance.values() for row in rows for name in row})
        writer.writerow(["arm", "seed", *findings.metrics, *columns])
        for arm, row in findings.table.items():
            for number, seed in enumerate(findings.seeds_of(arm)):
                origin = findings.provenance[arm][number] if columns else {}
                values = (row[metric].values[number] for metric in findings.metrics)
                writer.writerow([arm, seed, *values, *(origin.get(name, "") for name in columns)])
    return [out / name for name in (*files, "results.csv")]


def print_report(title: str, sections: Sequence[Section], written: Sequence[Path]) -> None:
    """Prints the tables and texts of a report, its pictures and its files.

    Args:
        title: Title of the report.
        sections: The sections.
        written: The files.
    """
    console = Console()
    for section in sections:
        for table in section.tables:
            console.print(_terminal_table(table, f"{title}: {table.caption or section.title}"))
        for text in map(plain, section.texts):
            console.print(text, soft_wrap=True, markup=False, highlight=False)
    for path in [*written, *(picture.path for section in sections for picture in section.pictures)]:
        console.print(str(path), soft_wrap=True, markup=False, highlight=False)


def _terminal_table(table: Table, title: str) -> RichTable:
    """A table for the terminal."""
    head, rows = list(table.columns), [list(row) for row in table.rows]
    if len(head) > _MOST_COLUMNS:
        head, *rows = [list(column) for column in zip(head, *rows, strict=True)]
    shown = RichTable(title=escape(title), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, name in enumerate(head):
        words = max(map(len, name.split()), default=0)
        shown.add_column(escape(name), justify="right" if number else "left", min_width=words)
    for row in rows:
        shown.add_row(*map(escape, row))
    return shown


def _markdown(title: str, sections: Sequence[Section], out: Path) -> str:
    """The report as Markdown, with the paths of pictures relative to the folder of the study."""
    lines = [f"# {title}"]
    for section in sections:
        lines += ["", f"## {section.title}"]
        lines += [line for text in section.texts if text for line in ("", text)]
        for table in section.tables:
            lines += ["", f"### {table.caption}"] if table.caption else []
            lines += ["", _table_row(table.columns), f"|{'---|' * len(table.columns)}", *map(_table_row, table.rows)]
        lines += [f"\n![{picture.alt}]({os.path.relpath(picture.path, out)})" for picture in section.pictures]
        for example in section.examples:
            lines += ["", f"### {example.title}"]
            for label, text in example.parts:
                lines += ["", f"**{label}**"] if label else []
                lines += ["", *fenced(text)]
    return "\n".join(lines) + "\n"


def _table_row(cells: Sequence[str]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _result_tables(findings: Findings) -> list[Table]:
    """The tables of results."""
    header = ["", *(metric.replace("_", " ") for metric in findings.metrics), "minutes"]
    return [
        Table(
            header,
            [
                [findings.labels[arm], *(findings.cell(arm, m) for m in findings.metrics)]
                + [findings.minutes[arm].format()]
                for arm in arms
            ],
            name.replace("_", " ").capitalize(),
        )
        for name, arms in findings.groups().items()
    ]


def _notes(findings: Findings) -> list[str]:
    """What the report is of, and how to read its tables."""
    found = [f"{seeds_text(findings.seeds).capitalize()}; made by `{findings.command}`."]
    if any(findings.paper.get(arm) for arm in findings.table):
        found.append("The paper's values are in brackets.")
    if len(findings.seeds) > 1:
        found.append("Means over seeds, ± half of Student's 95 % interval of the mean.")
    return [*found, *filter(None, [unfinished(findings)]), "Minutes are those of an arm's last stage alone."]


def _by_seed(findings: Findings) -> Section:
    """The first metric by seed; a dash where a seed is not done."""
    first = findings.metrics[0]
    rows = [[str(seed), *(findings.value(arm, first, seed) for arm in findings.table)] for seed in findings.seeds]
    table = Table(["seed", *(findings.labels[arm] for arm in findings.table)], rows)
    return Section(f"{first.replace('_', ' ').capitalize()} by seed", tables=[table])


def _closing_lines(findings: Findings) -> list[str]:
    """Lines on what the reported arms and metrics are, and on the commands to type next."""
    names = {**findings.labels, **{metric: metric.replace("_", " ") for metric in findings.metrics}}
    lines = [f"- {name}: {findings.meanings[key]}" for key, name in names.items() if key in findings.meanings]
    return lines + [f"- next: `{command}`" for command in findings.next_commands]
