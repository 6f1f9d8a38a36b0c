"""One self-contained HTML page on one run or many: verdicts, curves, rollouts, distributions, configuration.

The page loads nothing: styles, scripts (with uPlot, MIT licence) and data are inside, the data as gzip in base64. Its
content security policy allows the page's own script and styles by their hashes, pictures from the page itself, and
nothing else. Text of a run is only ever set as text, never parsed as HTML.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlmt.checkpointing.files import atomic_write
from rlmt.report.payload import payload
from rlmt.report.runs import Run
from rlmt.report.sections import Section

_SCRIPTS = ("base.js", "charts.js", "rollouts.js", "distributions.js", "sections.js", "main.js")
"""Files of `assets/`, joined to one script in this order."""
_PAGE = """<!doctype html>
<html lang="en" data-theme="auto">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script type="application/octet-stream" id="payload">{payload}</script>
<script>{script}</script>
</body>
</html>
"""


def render_page(title: str, runs: Sequence[Run], sections: Sequence[Section] = ()) -> str:
    """Renders the page.

    Args:
        title: Title of the page.
        runs: Runs in the order of the page; runs of one arm are drawn as one curve with a band.
        sections: Sections of the caller, after those of the runs' own evaluations.

    Returns:
        The HTML text.
    """
    data = payload(runs) | {"title": title, "sections": [_section(section) for section in sections]}
    raw = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    script = _script()
    style = _read("vendor/uplot/uPlot.min.css") + _read("assets/page.css")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return _PAGE.format(
        policy=policy,
        title=escape(title),
        style=style,
        body=_read("assets/body.html"),
        payload=base64.b64encode(gzip.compress(raw, 9, mtime=0)).decode(),
        script=script,
    )


def write_page(path: Path, title: str, runs: Sequence[Run], sections: Sequence[Section] = ()) -> Path:
    """Writes the page atomically; arguments as for `render_page`.

    Returns:
        The path.
    """
    with atomic_write(path) as unfinished:
        unfinished.write_text(render_page(title, runs, sections), encoding="utf-8")
    return path


def page_title(runs: Sequence[Run]) -> str:
    """`think` for one run, `think against no_think` for the arms of several."""
    arms = list(dict.fromkeys(run.arm for run in runs))
    return " against ".join(arms) if len(arms) <= 3 else f"{len(arms)} arms"


def _script() -> str:
    """UPlot and the page's own script, in strict mode and without global names."""
    own = "\n".join(_read(f"assets/{name}") for name in _SCRIPTS)
    return f'{_read("vendor/uplot/uPlot.iife.min.js")}\n(() => {{\n"use strict";\n{own}\n}})();\n'


def _read(name: str) -> str:
    return files("rlmt.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The source expression of the content security policy that allows an inline element with this text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _section(section: Section) -> Mapping[str, Any]:
    """A section as plain data, pictures as data URIs."""
    pictures = [
        {"src": f"data:image/png;base64,{base64.b64encode(p.path.read_bytes()).decode()}", "alt": p.alt}
        for p in section.pictures
    ]
    tables = [asdict(table) for table in section.tables]
    examples = [asdict(example) for example in section.examples]
    texts = list(section.texts)
    return {"title": section.title, "texts": texts, "tables": tables, "pictures": pictures, "examples": examples}
