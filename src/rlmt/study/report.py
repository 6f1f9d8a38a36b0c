"""The report of a study: tables, sentences and the figure as Markdown; `rlmt.study.page` makes the HTML page."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.markup import escape
from rich.table import Table

from rlmt.evaluation.statistics import Interval
from rlmt.report.estimates import CONFIDENCE, Estimate, correct_by_holm

_MOST_COLUMNS = 8
"""Metrics that fit side by side in a terminal."""


@dataclass
class Comparison:
    """A difference between two arms that the report states.

    Args:
        more: The arm that should have the higher value.
        than: The arm that should have the lower value.
        by: The metric; None uses the first metric of the study.
        expect: `above`: the difference should be above 0. `not_above`: it should not, as in a control.
    """

    more: str
    than: str
    by: str | None = None
    expect: Literal["above", "not_above"] = "above"

    @property
    def key(self) -> tuple[str, str, str | None]:
        """What identifies it in the findings."""
        return self.more, self.than, self.by


@dataclass(frozen=True)
class Findings:
    """Everything that a report shows."""

    title: str
    command: str
    """Command line that reproduces the report."""
    seeds: Sequence[int]
    labels: Mapping[str, str]
    """Arm → its label in tables and sentences."""
    metrics: Sequence[str]
    comparisons: Sequence[Comparison]
    table: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    """Arm → metric → values over seeds."""
    minutes: Mapping[str, Estimate] = field(default_factory=dict)
    """Arm → run time of its last stage in minutes."""
    figure: Path | None = None
    meanings: Mapping[str, str] = field(default_factory=dict)
    """Arm or metric → what it is."""
    samples: Sequence[str] = ()
    """Markdown lines with thoughts and answers before and after RL."""
    next_commands: Sequence[str] = ()
    """Commands that go on from here."""
    done: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Arm → the seeds that are done, where they are not all."""
    tables: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Name → the arms of a table; without any, one table has all arms."""
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Arm → metric → its value in a paper."""
    over_prompts: Mapping[tuple[str, str, str | None], Interval] = field(default_factory=dict)
    """`Comparison.key` → interval of the difference over prompts, of arms that were evaluated on the same ones."""
    provenance: Mapping[str, Sequence[Mapping[str, str]]] = field(default_factory=dict)
    """Arm → column → what its result came from, for each seed that is done."""

    def groups(self) -> dict[str, list[str]]:
        """Name → the reported arms of each table that has any; arms in no table are in one of their own."""
        named = {arm for arms in self.tables.values() for arm in arms}
        groups = {name: [arm for arm in arms if arm in self.table] for name, arms in self.tables.items()}
        groups[""] = [arm for arm in self.table if arm not in named]
        return {name: arms for name, arms in groups.items() if arms}

    def cell(self, arm: str, metric: str) -> str:
        """The estimate of an arm, with the paper's value in brackets."""
        digits = _digits(metric, self)
        paper = self.paper.get(arm, {}).get(metric)
        return self.table[arm][metric].format(digits) + ("" if paper is None else f" ({paper:.{digits}f})")

    def seeds_of(self, arm: str) -> Sequence[int]:
        """The seeds of an arm that are done."""
        return self.done.get(arm, self.seeds)

    def difference(self, comparison: Comparison) -> Estimate:
        """The difference of two arms, paired by seed, over the seeds that are done in both."""
        metric = comparison.by or self.metrics[0]
        more, than = (self.table[arm][metric].values for arm in (comparison.more, comparison.than))
        of_more = dict(zip(self.seeds_of(comparison.more), more, strict=True))
        of_than = dict(zip(self.seeds_of(comparison.than), than, strict=True))
        return Estimate(tuple(of_more[seed] - of_than[seed] for seed in of_more if seed in of_than))


def write_report(findings: Findings, out: Path) -> list[Path]:
    """Writes report.md, summary.json and results.csv.

    Args:
        findings: Contents of the report.
        out: Folder of the study.

    Returns:
        The written files.
    """
    summary = {
        arm: {metric: None if math.isnan(estimate.mean) else estimate.mean for metric, estimate in row.items()}
        for arm, row in findings.table.items()
    }
    files = {"report.md": _markdown(findings), "summary.json": json.dumps(summary, indent=2) + "\n"}
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


def terminal_tables(findings: Findings) -> list[Table]:
    """Tables of the results for the terminal."""
    tables = []
    for name, arms in findings.groups().items():
        title = f", {name.replace('_', ' ')}" if name else ""
        table = Table(title=escape(f"{findings.title}{title}: {seeds_text(findings.seeds)}"))
        head = [metric.replace("_", " ") for metric in findings.metrics]
        rows = [[findings.labels[arm], *(findings.cell(arm, metric) for metric in findings.metrics)] for arm in arms]
        if len(head) > _MOST_COLUMNS:  # metrics in the rows
            head, *rows = [list(column) for column in zip(["", *head], *rows, strict=True)]
            head = head[1:]
        table.add_column("")
        for name_of_column in head:
            table.add_column(escape(name_of_column), justify="right")
        for row in rows:
            table.add_row(*map(escape, row))
        tables.append(table)
    return tables


def comparison_sentences(findings: Findings) -> list[str]:
    """One Markdown sentence for each comparison between two reported arms that share a seed."""
    reported = [
        comparison
        for comparison in findings.comparisons
        if comparison.more in findings.table and comparison.than in findings.table
    ]
    differences = [(comparison, findings.difference(comparison)) for comparison in reported]
    tested = [p for _, difference in differences if difference.values and (p := difference.p_value) is not None]
    corrected = iter(correct_by_holm(tested))
    sentences = []
    for comparison, difference in differences:
        if len(difference.values) > 1:
            tests = (next(corrected), len(tested)) if len(tested) > 1 else None
            sentences.append(_sentence(comparison, difference, findings, tests))
        elif difference.values:
            text = _over_prompts(comparison, findings) or " (one seed: no interval)"
            sentences.append(f"{_difference(comparison, difference, findings)}{text}.")
    return sentences


def unfinished(findings: Findings) -> str:
    """A sentence on the arms and seeds that are not done yet; empty if all are."""
    missing = {arm: [seed for seed in findings.seeds if seed not in findings.seeds_of(arm)] for arm in findings.labels}
    texts = [
        f"{findings.labels[arm]}" + ("" if len(seeds) == len(findings.seeds) else f" ({seeds_text(seeds)})")
        for arm, seeds in missing.items()
        if seeds
    ]
    return f"Not done yet: {', '.join(texts)}." if texts else ""


def closing_lines(findings: Findings) -> list[str]:
    """Markdown lines on what the reported arms and metrics are, and on the commands to type next."""
    names = {**findings.labels, **{metric: metric.replace("_", " ") for metric in findings.metrics}}
    lines = [f"- {name}: {findings.meanings[key]}" for key, name in names.items() if key in findings.meanings]
    return lines + [f"- next: `{command}`" for command in findings.next_commands]


def _difference(comparison: Comparison, difference: Estimate, findings: Findings) -> str:
    """`RLMT − RLHF, rubric: +9.50`."""
    metric = comparison.by or findings.metrics[0]
    subject = f"{findings.labels[comparison.more]} − {findings.labels[comparison.than]}, {metric.replace('_', ' ')}: "
    return f"{subject}{difference.mean:+.{_digits(metric, findings)}f}"


def _over_prompts(comparison: Comparison, findings: Findings) -> str:
    """The interval of a difference over prompts; empty if it is not known."""
    found = findings.over_prompts.get(comparison.key)
    if found is None or math.isnan(found.low):
        return ""
    digits = _digits(comparison.by or findings.metrics[0], findings)
    return f", 95 % interval over prompts {found.low:.{digits}f} to {found.high:.{digits}f}"


def _sentence(comparison: Comparison, difference: Estimate, findings: Findings, tests: tuple[float, int] | None) -> str:
    """The difference, its interval and whether it is the expected one.

    Args:
        comparison: The comparison.
        difference: Its difference, of several seeds.
        findings: The findings.
        tests: Its p-value, corrected for the number of comparisons, and that number; None for a single comparison.
    """
    metric = comparison.by or findings.metrics[0]
    more, than = findings.table[comparison.more][metric], findings.table[comparison.than][metric]
    digits = _digits(metric, findings)
    by_seed = ", ".join(f"{value:+.{digits}f}" for value in difference.values)
    assert difference.interval is not None and difference.p_value is not None
    low, high = difference.interval
    sign = "above" if low > 0 else "below" if high < 0 else "level"
    verdict = {
        ("above", "above"): "above 0, as expected",
        ("above", "level"): "**the interval contains 0: no difference shown, but one was expected**",
        ("above", "below"): "**below 0: the opposite of the expected difference**",
        ("not_above", "above"): "**above 0, but no difference was expected**",
        ("not_above", "level"): "no difference, as expected of a control",
        ("not_above", "below"): "below 0, not above, as expected of a control",
    }[comparison.expect, sign]
    p_value = ""
    if tests is not None:
        p_value = f"; p {difference.p_value:.2g}, corrected for {tests[1]} comparisons {tests[0]:.2g}"
        if sign != "level" and tests[0] > 1 - CONFIDENCE:
            verdict += " **by itself, but not after the correction**"
    ratio = f", ×{more.mean / than.mean:.2f}" if than.mean > 0 and more.mean > 0 else ""
    prompts = _over_prompts(comparison, findings)
    return (
        f"{_difference(comparison, difference, findings)}{ratio}, 95 % interval {low:.{digits}f} to {high:.{digits}f} "
        f"(by seed {by_seed}{p_value}){prompts}: {verdict}."
    )


def _markdown(findings: Findings) -> str:
    """The report as Markdown."""
    lines = [f"# {findings.title}", "", f"{seeds_text(findings.seeds)}; made by"]
    lines += ["", "```sh", findings.command, "```", ""]
    lines += ["## Results"]
    for name, header, rows in result_tables(findings):
        lines += ["", f"### {name}"] if name else []
        lines += ["", _table_row(header, header=True), *map(_table_row, rows)]
    lines += [line for note in notes(findings) for line in ("", note)]
    lines += ["", "## Differences", "", *(f"- {sentence}" for sentence in comparison_sentences(findings))]
    if len(findings.seeds) > 1:
        title, header, rows = seed_table(findings)
        lines += ["", f"## {title}", "", _table_row(header, header=True), *map(_table_row, rows)]
    if findings.samples:
        lines += ["", "## Thoughts and answers before and after", "", "Thoughts are in brackets.", *findings.samples]
    if closing := closing_lines(findings):
        lines += ["", "## What the words mean, and what comes next", "", *closing]
    if findings.figure is not None:
        lines += ["", "## Curves", "", f"![Curves of {findings.title}]({findings.figure.name})"]
    return "\n".join(lines) + "\n"


def result_tables(findings: Findings) -> list[tuple[str, list[str], list[list[str]]]]:
    """Name, header and rows of each table of results; the name of a single table is empty."""
    header = ["", *(metric.replace("_", " ") for metric in findings.metrics), "minutes"]
    tables = []
    for name, arms in findings.groups().items():
        rows = [
            [findings.labels[arm], *(findings.cell(arm, m) for m in findings.metrics), findings.minutes[arm].format()]
            for arm in arms
        ]
        tables.append((name.replace("_", " ").capitalize(), header, rows))
    return tables


def notes(findings: Findings) -> list[str]:
    """Sentences below the tables of results."""
    found = ["The paper's values are in brackets."] if any(findings.paper.get(arm) for arm in findings.table) else []
    if len(findings.seeds) > 1:
        found.append("Means over seeds, ± half of Student's 95 % interval of the mean.")
    return [*found, *filter(None, [unfinished(findings)]), "Minutes are those of an arm's last stage alone."]


def seed_table(findings: Findings) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and rows of the table of the first metric by seed; a dash where a seed is not done."""
    first = findings.metrics[0]
    rows = [[str(seed), *(_value(findings, arm, seed) for arm in findings.table)] for seed in findings.seeds]
    header = ["seed", *(findings.labels[arm] for arm in findings.table)]
    return f"{first.replace('_', ' ').capitalize()} by seed", header, rows


def _value(findings: Findings, arm: str, seed: int) -> str:
    """The value of the first metric for a seed, or a dash if it is not done."""
    metric, seeds = findings.metrics[0], list(findings.seeds_of(arm))
    values = findings.table[arm][metric].values
    return f"{values[seeds.index(seed)]:.{_digits(metric, findings)}f}" if seed in seeds else "–"


def _table_row(cells: Sequence[str], header: bool = False) -> str:
    """One row of a Markdown table; a header row is followed by its separator."""
    row = f"| {' | '.join(cell.replace('_', ' ') for cell in cells)} |"
    return f"{row}\n|{'---|' * len(cells)}" if header else row


def seeds_text(seeds: Sequence[int]) -> str:
    """`seed 1` or `2 seeds (1, 2)`."""
    numbers = ", ".join(map(str, seeds))
    return f"{len(seeds)} seeds ({numbers})" if len(seeds) > 1 else f"seed {numbers}"


def _digits(metric: str, findings: Findings) -> int:
    """Number of decimals: the larger the values, the fewer."""
    values = [value for row in findings.table.values() for value in row[metric].values if not math.isnan(value)]
    largest = max(map(abs, values), default=0)
    return 1 if largest >= 10 else 2 if largest >= 0.5 else 3
