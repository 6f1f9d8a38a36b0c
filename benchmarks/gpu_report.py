"""The results of benchmarks/gpu.py: each figure is printed and written when it is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FAILED, OK, SKIPPED, MISSED = "FAILED", "ok", "skipped", "missed"
"""A figure out of its limit; within its limit or target; not measured; measured and short of its target."""
HEADER = "| part | figure | value | unit | target | |\n|---|---|---|---|---|---|\n"


class Report:
    """Appends rows to `gpu.jsonl`, and to a table in `gpu.md`.

    Args:
        folder: Folder of both files; several processes may append.
        part: Number of the part that rows belong to.
    """

    def __init__(self, folder: Path, part: int = 0) -> None:
        self._json, self._table = folder / "gpu.jsonl", folder / "gpu.md"
        self._part = part

    def start(self, title: str) -> None:
        """Begins new files."""
        self._json.write_text("")
        self._table.write_text(f"{title}\n\n{HEADER}")

    def title(self, part: int, title: str) -> None:
        """Begins a part."""
        self._part = part
        print(f"\n{part}. {title}", flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return [json.loads(line) for line in self._json.read_text().splitlines()]

    def row(self, figure: str, value: float | str, unit: str = "", target: str = "", status: str = "") -> None:
        """Writes a figure.

        Args:
            figure: What was measured.
            value: The value.
            unit: Its unit.
            target: What it should be.
            status: Whether it is.
        """
        shown = value if isinstance(value, str) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        row = {"part": self._part, "figure": figure, "value": value, "unit": unit, "target": target, "status": status}
        with self._json.open("a") as file:
            file.write(json.dumps(row) + "\n")
        with self._table.open("a") as file:
            file.write(f"| {self._part} | {figure} | {shown} | {unit} | {target} | {status} |\n")
        print(f"   {figure}: {shown} {unit}{f' (target: {target})' if target else ''} {status}".rstrip(), flush=True)

    def equal(self, figure: str, difference: float, limit: float, unit: str = "") -> None:
        """Writes a difference that may be at most `limit`; NaN fails."""
        self.row(figure, difference, unit, f"at most {limit:g}", OK if difference <= limit else FAILED)

    def goal(self, figure: str, value: float, unit: str, target: str, reached: bool) -> None:
        """Writes a figure beside its target; a target that is missed is no failure."""
        self.row(figure, value, unit, target, OK if reached else MISSED)

    def skip(self, reason: str) -> None:
        """Writes that something is not measured."""
        self.row("not measured", reason, status=SKIPPED)

    def fail(self, reason: str) -> None:
        """Writes that a part did not end well."""
        self.row("not complete", reason, status=FAILED)
