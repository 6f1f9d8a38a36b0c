"""What a study found: values of its arms over seeds, and the differences that it states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rlmt.evaluation.statistics import Interval
from rlmt.report.estimates import CONFIDENCE, Estimate, correct_by_holm
from rlmt.report.sections import Section


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
    """Markdown lines with thoughts and answers of several arms to the same held-out prompts."""
    analyses: Sequence[Section] = ()
    """Reports of arms that have no metrics but one of their own, such as `rlmt traits`."""
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
        digits = self.digits(metric)
        paper = self.paper.get(arm, {}).get(metric)
        return self.table[arm][metric].format(digits) + ("" if paper is None else f" ({paper:.{digits}f})")

    def value(self, arm: str, metric: str, seed: int) -> str:
        """The value of an arm for a seed, or a dash if it is not done."""
        values = dict(zip(self.seeds_of(arm), self.table[arm][metric].values, strict=True))
        return f"{values[seed]:.{self.digits(metric)}f}" if seed in values else "–"

    def digits(self, metric: str) -> int:
        """Number of decimals: the larger the values, the fewer."""
        values = [value for row in self.table.values() for value in row[metric].values if not math.isnan(value)]
        largest = max(map(abs, values), default=0)
        return 1 if largest >= 10 else 2 if largest >= 0.5 else 3

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


def seeds_text(seeds: Sequence[int]) -> str:
    """`seed 1` or `2 seeds (1, 2)`."""
    numbers = ", ".join(map(str, seeds))
    return f"{len(seeds)} seeds ({numbers})" if len(seeds) > 1 else f"seed {numbers}"


def unfinished(findings: Findings) -> str:
    """A sentence on the arms and seeds that are not done yet; empty if all are."""
    missing = {arm: [seed for seed in findings.seeds if seed not in findings.seeds_of(arm)] for arm in findings.labels}
    texts = [
        f"{findings.labels[arm]}" + ("" if len(seeds) == len(findings.seeds) else f" ({seeds_text(seeds)})")
        for arm, seeds in missing.items()
        if seeds
    ]
    return f"Not done yet: {', '.join(texts)}." if texts else ""


def comparison_sentences(findings: Findings) -> list[str]:
    """One Markdown sentence for each comparison between two reported arms that share a seed with a value."""
    found = []
    for comparison in findings.comparisons:
        if comparison.more in findings.table and comparison.than in findings.table:
            difference = findings.difference(comparison)
            if difference.values and not math.isnan(difference.mean):
                found.append((comparison, difference))
    tested = [p for _, difference in found if (p := difference.p_value) is not None]
    corrected = iter(correct_by_holm(tested))
    sentences = []
    for comparison, difference in found:
        if len(difference.values) > 1:
            tests = (next(corrected), len(tested)) if len(tested) > 1 else None
            sentences.append(_sentence(comparison, difference, findings, tests))
        else:
            text = _over_prompts(comparison, findings) or " (one seed: no interval)"
            sentences.append(f"{_difference(comparison, difference, findings)}{text}.")
    return sentences


def _difference(comparison: Comparison, difference: Estimate, findings: Findings) -> str:
    """`RLMT − RLHF, rubric: +9.50`."""
    metric = comparison.by or findings.metrics[0]
    subject = f"{findings.labels[comparison.more]} − {findings.labels[comparison.than]}, {metric.replace('_', ' ')}: "
    return f"{subject}{difference.mean:+.{findings.digits(metric)}f}"


def _over_prompts(comparison: Comparison, findings: Findings) -> str:
    """The interval of a difference over prompts; empty if it is not known."""
    found = findings.over_prompts.get(comparison.key)
    if found is None or math.isnan(found.low):
        return ""
    digits = findings.digits(comparison.by or findings.metrics[0])
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
    digits = findings.digits(metric)
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
