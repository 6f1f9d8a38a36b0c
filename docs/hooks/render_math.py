"""Renders LaTeX formulas to SVG while the site is built, so that pages load no script from a server.

Pages write `$...$` and `$$...$$`, as GitHub reads them. Matplotlib's mathtext renders them; a formula that mathtext
cannot parse fails the build.
"""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser

_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\w$\\])\$([^$\n]+?)\$(?!\w)", re.DOTALL)
_FONT_SIZE = 12  # points, of which CSS makes 1 em


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the formulas of a page outside of code; called by MkDocs."""
    parts = _CODE.split(markdown)
    return "".join(part if part.startswith("`") else _FORMULA.sub(_render, part) for part in parts)


def to_svg(formula: str) -> tuple[str, float]:
    """Renders one formula.

    Args:
        formula: LaTeX within matplotlib's mathtext, without dollar signs.

    Returns:
        SVG markup, sized in em and in the color of the text around it, and its depth below the baseline in em.
    """
    text = f"${' '.join(formula.split())}$"
    font = FontProperties(size=_FONT_SIZE, math_fontfamily="cm")
    width, height, depth, *_ = MathTextParser("path").parse(text, dpi=72, prop=font)
    figure = Figure(figsize=(width / 72, height / 72))
    FigureCanvasSVG(figure)
    figure.text(0, depth / height, text, fontproperties=font)
    out = StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    size = f'width="{width / _FONT_SIZE:.3f}em" height="{height / _FONT_SIZE:.3f}em"'
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', size, svg, count=1).replace("<g ", '<g fill="currentColor" ', 1)
    svg = re.sub(r"<(metadata|defs)>\s*<style.*?</\1>|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return " ".join(svg.split()), depth / _FONT_SIZE


def _render(match: re.Match[str]) -> str:
    display, inline = match.groups()
    svg, depth = to_svg(display or inline)
    if display:
        return f'<div style="overflow-x:auto;margin:1em 0">{svg}</div>'
    return svg.replace("<svg ", f'<svg style="vertical-align:-{depth:.3f}em" ', 1)
