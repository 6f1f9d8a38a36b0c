"""The page of a study: that of `rlmt report` on the runs of its arms, with the tables and sentences of the report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rlmt.report.page import Section, Table, write_page
from rlmt.report.runs import Run
from rlmt.study.report import (
    Findings,
    closing_lines,
    comparison_sentences,
    notes,
    result_tables,
    seed_table,
    seeds_text,
)


def write_study_page(findings: Findings, runs: Sequence[Run], path: Path) -> Path:
    """Writes the page.

    Args:
        findings: Contents of the report.
        runs: Runs whose curves and rollouts it shows; those of an arm are one curve with a band.
        path: File to write.

    Returns:
        The path.
    """
    return write_page(path, findings.title, runs, sections(findings))


def sections(findings: Findings) -> list[Section]:
    """The contents of the report as sections of the page."""
    made_by = f"{seeds_text(findings.seeds)}; made by {findings.command}"
    tables = [Table(header, rows, name) for name, header, rows in result_tables(findings)]
    found = [
        Section("Results", [made_by, *notes(findings)], tables),
        Section("Differences", _plain(comparison_sentences(findings))),
    ]
    if len(findings.seeds) > 1:
        title, header, rows = seed_table(findings)
        found.append(Section(title, tables=[Table(header, rows)]))
    found.append(Section("Before and after", _plain(findings.samples)))
    found.append(Section("What comes next", _plain(closing_lines(findings))))
    return [section for section in found if section.texts or section.tables]


def _plain(lines: Sequence[str]) -> list[str]:
    """Lines of Markdown as plain texts: no marks of lists and quotes, no emphasis and code, no backslashes."""
    texts = (re.sub(r"^(?:- |> )", "", line) for line in lines if line)
    return [re.sub(r"\\(.)|\*\*|`", lambda match: match[1] or "", text) for text in texts]
