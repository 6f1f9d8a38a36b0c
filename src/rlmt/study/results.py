"""Logged metrics of a job."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from rlmt.errors import UserError

Row = dict[str, float]
"""Metric → value of one line of metrics.csv, without empty cells."""


def read_rows(folder: Path) -> list[Row]:
    """Reads all lines that the runs of a job logged, in order.

    A resumed run logs some steps again; only the lines of the last run that logged a step are returned.

    Args:
        folder: Folder of the job, with one `version_N/metrics.csv` for each start.

    Returns:
        The lines.

    Raises:
        UserError: The folder holds no metrics.csv.
    """
    files = sorted(folder.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.rpartition("_")[2]))
    if not files:
        raise UserError(f"{folder}: no version_*/metrics.csv was found; an arm's stage must run `fit` or `validate`.")
    rows: list[Row] = []
    for path in files:
        with path.open(encoding="utf-8", newline="") as file:
            new = [{name: float(cell) for name, cell in line.items() if cell} for line in csv.DictReader(file)]
        first = min((row["step"] for row in new if "step" in row), default=math.inf)
        rows = [row for row in rows if row.get("step", -1) < first] + new
    return rows


def last_values(rows: Sequence[Row], metrics: dict[str, str], folder: Path) -> dict[str, float]:
    """Returns the last logged value of each metric.

    Args:
        rows: The logged lines.
        metrics: Name → the name under which it was logged.
        folder: Folder of the job, for error messages.

    Returns:
        Name → value.

    Raises:
        UserError: A metric was never logged.
    """
    found = {}
    for name, logged in metrics.items():
        values = [row[logged] for row in rows if logged in row]
        if not values:
            raise UserError(f"--metrics.{name}: {logged} was never logged in {folder}; name a logged metric.")
        found[name] = values[-1]
    return found
