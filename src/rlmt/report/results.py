"""Sections of a page from the reports of `rlmt compare` and `rlmt traits`: their texts, tables, figure and examples."""

from __future__ import annotations

import re
from pathlib import Path

from markdown_it import MarkdownIt

from rlmt.errors import UserError
from rlmt.report.sections import Example, Picture, Section, Table

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
    """A Markdown report: headings and paragraphs as texts, its tables, its figure, and an example for each `###`."""
    title = path.stem.capitalize()
    texts: list[str] = []
    tables: list[Table] = []
    rows: list[list[str]] = []
    examples: list[Example] = []
    parts: list[tuple[str, str]] | None = None  # of the example that is being read
    inside = label = group = ""
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        match token.type:
            case "table_open":
                rows = []
            case "tr_open":
                rows.append([])
            case "table_close":
                tables.append(Table(rows[0], rows[1:]))
            case "heading_open" | "paragraph_open" | "th_open" | "td_open":
                inside = token.tag
            case "fence" if parts is not None:
                parts.append((label, token.content.removesuffix("\n")))
            case "inline":
                text = _plain(token.content)
                match inside:
                    case "h1":
                        title = text
                    case "th" | "td":
                        rows[-1].append(text)
                    case "h2":
                        group, parts = text, None
                    case "h3":
                        parts = []
                        examples.append(Example(f"{group}: {text}" if group else text, parts))
                    case _ if parts is None:
                        texts.extend([text] if text else [])
                    case _ if token.content == f"**{text}**":
                        label = text
                    case _:
                        parts.append(("", text))
    figure = path.with_name(REPORTS[path.name])
    pictures = [Picture(figure, title)] if figure.is_file() else []
    return Section(title, texts, tables, pictures, examples)


def _plain(text: str) -> str:
    """Text without Markdown's emphasis, code marks and pictures."""
    return re.sub(r"!\[[^\]]*\]\([^)]*\)|\*\*|`", "", text).strip()
