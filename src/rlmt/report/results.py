"""Sections of a page from the reports that `rlmt compare` and `rlmt traits` write: their texts, tables and figure."""

from __future__ import annotations

import re
from pathlib import Path

from markdown_it import MarkdownIt

from rlmt.errors import UserError
from rlmt.report.page import Picture, Section, Table

REPORTS = {"comparison.md": "comparison.png", "traits.md": "traits.png"}
"""Report of a command → the figure beside it, if it wrote one."""


def read_sections(folder: Path) -> list[Section]:
    """Reads the reports in a folder.

    Args:
        folder: `--out` of `rlmt compare` or `rlmt traits`.

    Returns:
        One section a report.

    Raises:
        UserError: The folder has none.
    """
    found = [folder / name for name in REPORTS if (folder / name).is_file()]
    if not found:
        raise UserError(
            f"--results {folder}: has none of {', '.join(REPORTS)}; pass the --out of `rlmt compare` or `rlmt traits`."
        )
    return [_section(path) for path in found]


def _section(path: Path) -> Section:
    """A Markdown report: headings and paragraphs as texts, its tables, and its figure."""
    title = path.stem.capitalize()
    texts: list[str] = []
    tables: list[Table] = []
    rows: list[list[str]] = []
    inside = ""
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "table_close":
            tables.append(Table(rows[0], rows[1:]))
        elif token.type in ("heading_open", "paragraph_open", "th_open", "td_open"):
            inside = token.tag
        elif token.type == "inline":
            text = _plain(token.content)
            if inside == "h1":
                title = text
            elif inside in ("th", "td"):
                rows[-1].append(text)
            elif text:
                texts.append(text)
    figure = path.with_name(REPORTS[path.name])
    pictures = [Picture(figure, title)] if figure.is_file() else []
    return Section(title, texts, tables, pictures)


def _plain(text: str) -> str:
    """Text without Markdown's emphasis, code marks and pictures."""
    return re.sub(r"!\[[^\]]*\]\([^)]*\)|\*\*|`", "", text).strip()
