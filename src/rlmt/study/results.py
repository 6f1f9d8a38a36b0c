"""Logged metrics of a job."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from rlmt.errors import UserError
from rlmt.evaluation.benchmarks import BENCHMARKS
from rlmt.evaluation.statistics import Floats, Interval, interval
from rlmt.evaluation.table import CHAT, MANY_GROUPS, OVERALL, PAPER_TABLE, averaged

Row = dict[str, float]
"""Metric → value of one line of metrics.csv, without empty cells."""

AVERAGES = {"chat_average": CHAT, "average": OVERALL}
"""Metric → average of `rlmt evaluate`."""


def read_rows(folder: Path) -> list[Row]:
    """Reads all lines that the runs of a job logged, in order.

    A resumed run logs some steps again; only the lines of the last run that logged a step are returned.

    Args:
        folder: Folder of the job, with one `version_N/metrics.csv` for each start.

    Returns:
        The lines.

    Raises:
        UserError: The folder holds neither a metrics.csv nor results of `rlmt evaluate`.
    """
    if scores := read_scores(folder):
        return [scores]
    files = sorted(folder.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.rpartition("_")[2]))
    if not files:
        raise UserError(
            f"{folder}: no version_*/metrics.csv was found; an arm's stage must run `fit`, `validate` or `evaluate`."
        )
    rows: list[Row] = []
    for path in files:
        with path.open(encoding="utf-8", newline="") as file:
            new = [{name: float(cell) for name, cell in line.items() if cell} for line in csv.DictReader(file)]
        first = min((row["step"] for row in new if "step" in row), default=math.inf)
        rows = [row for row in rows if row.get("step", -1) < first] + new
    return rows


def read_scores(folder: Path) -> Row:
    """Reads what `rlmt evaluate` wrote of one model.

    Args:
        folder: Its output folder.

    Returns:
        `<benchmark>/<figure>` → value for each figure; `chat_average` and `average`, the averages of `rlmt evaluate`;
        `thought_tokens`, `response_tokens`, `malformed` and `unparsed` as means or shares over all items. A benchmark
        of the paper's table that was not run has nan, and so have token counts that are not known of every benchmark.
        Empty without results.
    """
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/*/ours.json"))]
    if not results:
        return {}
    row = {f"{name}/{figure}": math.nan for name in PAPER_TABLE for figure in BENCHMARKS[name].figures}
    first: dict[str, float] = {}
    for result in results:
        values = {name: math.nan if it["value"] is None else it["value"] for name, it in result["figures"].items()}
        row |= {f"{result['benchmark']}/{figure}": value for figure, value in values.items()}
        first[result["benchmark"]] = next(iter(values.values()))
    members = averaged(list(first), {result["benchmark"]: result["chat"] for result in results})
    items = sum(result["n"] for result in results)
    for name in ("malformed", "unparsed"):
        row[name] = sum(result[name] for result in results) / items
    for name in ("thought_tokens", "response_tokens"):
        row[name] = (
            sum((math.nan if result[name] is None else result[name]) * result["n"] for result in results) / items
        )
    return row | {
        name: statistics.fmean(first[benchmark] for benchmark in members[title])
        for name, title in AVERAGES.items()
        if members[title]
    }


def read_resamples(folder: Path, logged: str) -> Floats | None:
    """Reads a figure of each bootstrap resample over prompts; resample k has the same prompts in every folder.

    Args:
        folder: Output folder of `rlmt evaluate` of one model.
        logged: Name of the figure, as `read_scores` names it.

    Returns:
        [resamples] figures, or None if the figure has none.
    """
    files = {path.parents[1].name: path for path in sorted(folder.glob("*/*/ours.json"))}
    tables = {name: path.with_suffix(".resamples.parquet") for name, path in files.items()}
    if logged in AVERAGES:
        chat = {name: json.loads(path.read_text(encoding="utf-8"))["chat"] for name, path in files.items()}
        chosen = averaged(list(files), chat)[AVERAGES[logged]]
        columns = [pq.read_table(tables[name]).column(0).to_numpy() for name in chosen]
        return np.mean(columns, axis=0) if columns else None
    benchmark, _, figure = logged.partition("/")
    if benchmark not in tables:
        return None
    table = pq.read_table(tables[benchmark])
    return table.column(figure).to_numpy() if figure in table.column_names else None


def interval_over_prompts(pairs: Sequence[tuple[Path, Path]], logged: str) -> Interval | None:
    """The difference of two arms, paired by seed and prompt, with its 95 % interval by bootstrap over prompts.

    Args:
        pairs: Folders of the two arms for each seed.
        logged: Name of the figure.

    Returns:
        The interval, or None if the arms were not evaluated on the same prompts by `rlmt evaluate`.
    """
    differences = []
    for folders in pairs:
        more, than = (read_resamples(folder, logged) for folder in folders)
        if more is None or than is None:
            return None
        differences.append(more - than)
    difference: Floats = np.mean(differences, axis=0)
    return interval(float(difference.mean()), difference, MANY_GROUPS)


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
