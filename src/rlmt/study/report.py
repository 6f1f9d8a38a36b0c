"""The report of a study: tables, plain sentences, the picture, as Markdown and as one HTML file."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Literal

from markdown_it import MarkdownIt
from rich.table import Table

from rlmt.study.results import Estimate

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse }}
td, th {{ padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left }}
img {{ max-width: 100% }} code {{ background: #f3f3f3; padding: 0 .2rem }} pre code {{ display: block; padding: .5rem }}
</style>
{body}</html>
"""


@dataclass
class Comparison:
    """A question to the results.

    Args:
        more: the arm that should have more.
        than: the arm that should have less.
        by: the metric; None takes the study's first.
        expect: `above`: the difference should be above 0; `not_above`: it should not, as in a control.
    """

    more: str
    than: str
    by: str | None = None
    expect: Literal["above", "not_above"] = "above"


@dataclass(frozen=True)
class Findings:
    """All that a report tells."""

    title: str
    command: str
    """How to make it again."""
    seeds: Sequence[int]
    labels: Mapping[str, str]
    """Arm → what people call it."""
    metrics: Sequence[str]
    comparisons: Sequence[Comparison]
    table: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    """Arm → metric → values over seeds."""
    minutes: Mapping[str, Estimate] = field(default_factory=dict)
    """Arm → minutes that its last stage took."""
    picture: Path | None = None


def write_report(findings: Findings, out: Path) -> list[Path]:
    """Writes report.md, report.html, summary.json and results.csv.

    Args:
        findings: what to tell.
        out: folder of the study.

    Returns:
        What was written.
    """
    text = _markdown(findings)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    if findings.picture is not None:
        encoded = base64.b64encode(findings.picture.read_bytes()).decode()
        body = body.replace(f'src="{findings.picture.name}"', f'src="data:image/png;base64,{encoded}"')
    summary = {arm: {metric: estimate.mean for metric, estimate in row.items()} for arm, row in findings.table.items()}
    files = {
        "report.md": text,
        "report.html": _PAGE.format(title=escape(findings.title), body=body),
        "summary.json": json.dumps(summary, indent=2) + "\n",
    }
    for name, content in files.items():
        (out / name).write_text(content, encoding="utf-8")
    with (out / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", *findings.metrics])
        for arm, row in findings.table.items():
            for number, seed in enumerate(findings.seeds):
                writer.writerow([arm, seed, *(row[metric].values[number] for metric in findings.metrics)])
    return [out / name for name in (*files, "results.csv")]


def print_table(findings: Findings) -> Table:
    """The table for a terminal."""
    table = Table(title=f"{findings.title}: {_seeds(findings)}")
    table.add_column("")
    for metric in findings.metrics:
        table.add_column(metric.replace("_", " "), justify="right")
    for arm, row in findings.table.items():
        table.add_row(
            findings.labels[arm], *(row[metric].write(_digits(metric, findings)) for metric in findings.metrics)
        )
    return table


def sentences(findings: Findings) -> list[str]:
    """What the comparisons came to, in plain words."""
    return [_sentence(question, findings) for question in findings.comparisons if _known(question, findings)]


def _known(question: Comparison, findings: Findings) -> bool:
    return question.more in findings.table and question.than in findings.table


def _sentence(question: Comparison, findings: Findings) -> str:
    metric = question.by or findings.metrics[0]
    more, than = findings.table[question.more][metric], findings.table[question.than][metric]
    difference = more.minus(than)
    digits = _digits(metric, findings)
    said = f"{findings.labels[question.more]} − {findings.labels[question.than]}, {metric.replace('_', ' ')}: "
    by_seed = ", ".join(f"{value:+.{digits}f}" for value in difference.values)
    if difference.interval is None:
        return f"{said}{difference.mean:+.{digits}f} (one seed: no interval)."
    low, high = difference.interval
    found = "above" if low > 0 else "below" if high < 0 else "level"
    verdict = {
        ("above", "above"): "above 0, as expected",
        ("above", "level"): "**the interval holds 0: no difference shown where one was expected**",
        ("above", "below"): "**below 0: the other way round from what was expected**",
        ("not_above", "above"): "**above 0, where none was expected**",
        ("not_above", "level"): "no difference, as expected of a control",
        ("not_above", "below"): "below 0, and so not above, as expected of a control",
    }[question.expect, found]
    ratio = f", ×{more.mean / than.mean:.2f}" if than.mean > 0 and more.mean > 0 else ""
    return (
        f"{said}{difference.mean:+.{digits}f}{ratio}, 95 % interval {low:.{digits}f} to {high:.{digits}f} "
        f"(by seed {by_seed}): {verdict}."
    )


def _markdown(findings: Findings) -> str:
    lines = [f"# {findings.title}", "", f"{_seeds(findings)}; made by", "", "```sh", findings.command, "```", ""]
    lines += ["## Results", "", _rule(["", *findings.metrics, "minutes"])]
    for arm, row in findings.table.items():
        cells = [row[metric].write(_digits(metric, findings)) for metric in findings.metrics]
        lines.append(_rule([findings.labels[arm], *cells, findings.minutes[arm].write()], head=False))
    if len(findings.seeds) > 1:
        lines += ["", "Means over seeds, ± half of Student's 95 % interval of the mean."]
    lines += ["", "Minutes are of an arm's last stage alone.", "", "## Differences", ""]
    lines += [f"- {sentence}" for sentence in sentences(findings)]
    if len(findings.seeds) > 1:
        first = findings.metrics[0]
        lines += ["", f"## {first.replace('_', ' ').capitalize()} by seed", ""]
        lines.append(_rule(["seed", *(findings.labels[arm] for arm in findings.table)]))
        for number, seed in enumerate(findings.seeds):
            values = [f"{row[first].values[number]:.{_digits(first, findings)}f}" for row in findings.table.values()]
            lines.append(_rule([str(seed), *values], head=False))
    if findings.picture is not None:
        lines += ["", "## Curves", "", f"![Curves of {findings.title}]({findings.picture.name})"]
    return "\n".join(lines) + "\n"


def _rule(cells: Sequence[str], head: bool = True) -> str:
    row = f"| {' | '.join(cell.replace('_', ' ') for cell in cells)} |"
    return f"{row}\n|{'---|' * len(cells)}" if head else row


def _seeds(findings: Findings) -> str:
    seeds = ", ".join(map(str, findings.seeds))
    return f"{len(findings.seeds)} seeds ({seeds})" if len(findings.seeds) > 1 else f"seed {seeds}"


def _digits(metric: str, findings: Findings) -> int:
    """Decimals that show differences: the fewer, the larger the values."""
    largest = max(abs(value) for row in findings.table.values() for value in row[metric].values)
    return 1 if largest >= 10 else 2 if largest >= 0.5 else 3
