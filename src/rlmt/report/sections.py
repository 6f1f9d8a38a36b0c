"""What a report holds beside curves: sections of texts, tables, pictures and examples, for a page or for Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """A table of a section."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG of a section."""

    path: Path
    alt: str
    """What it shows, for readers who do not see it."""


@dataclass(frozen=True)
class Example:
    """Something to read, folded until a reader opens it."""

    title: str
    parts: Sequence[tuple[str, str]]
    """Label, which may be empty, and text, shown as it is."""


@dataclass(frozen=True)
class Section:
    """A section after the curves, such as the comparison of a study: its parts in this order."""

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    examples: Sequence[Example] = ()


def plain(text: str) -> str:
    """A line of Markdown as plain text: no mark of a list or quote, no emphasis, code or picture, no backslashes."""
    text = re.sub(r"^(?:- |> )", "", text.strip())
    return re.sub(r"\\(.)|!\[[^\]]*\]\([^)]*\)|\*\*|`", lambda match: match[1] or "", text).strip()


def fenced(text: str) -> list[str]:
    """Lines of Markdown that show a text as it is, whatever backticks it contains."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}text", text, fence]
