"""Tables of text as Markdown, LaTeX and HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

from rlmt.evaluation.table import Table

_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "–": "--"},
}


def to_markdown(tables: Sequence[Table]) -> str:
    """The tables as Markdown; numbers are right-aligned."""
    blocks = []
    for table in tables:
        lines = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.rows]
        rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        blocks.append("\n".join([f"**{table.title}**", "", *rows]))
    return "\n\n".join(blocks) + "\n"


def to_latex(tables: Sequence[Table]) -> str:
    """The tables as LaTeX, for the package booktabs."""
    blocks = []
    for table in tables:
        head, *body = (" & ".join(map(_escape_latex, line)) + r" \\" for line in (table.columns, *table.rows))
        columns = "l" + "r" * (len(table.columns) - 1)
        lines = [f"% {table.title}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body]
        blocks.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(blocks) + "\n"


def to_html(tables: Sequence[Table]) -> str:
    """The tables as one page of HTML without scripts."""
    style = "td:not(:first-child),th:not(:first-child){text-align:right}td,th{padding:.2em .8em}"
    blocks = []
    for table in tables:
        head, *body = (
            "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"
            for tag, line in (("th", table.columns), *(("td", row) for row in table.rows))
        )
        rows = "\n".join(body)
        blocks.append(
            f"<table>\n<caption>{html.escape(table.title)}</caption>\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
        )
    page = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Results</title>\n<style>{style}</style>\n'
    )
    return page + "\n".join(blocks) + "\n</html>\n"


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in text)


RENDERERS: dict[str, Callable[[Sequence[Table]], str]] = {".md": to_markdown, ".tex": to_latex, ".html": to_html}
"""Renderer of each file type, by suffix."""
