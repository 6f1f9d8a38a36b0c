"""The table of results: models in rows, benchmarks in columns, averages, and the difference of two models.

All numbers come from the results on disk. A column never mixes judges, baselines, items or scorings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlmt.errors import UserError
from rlmt.evaluation.results import read_resamples
from rlmt.evaluation.statistics import Floats, Interval, interval

PAPER_TABLE = ("wildbench", "alpaca_eval", "arena_hard", "creative_writing", "popqa", "ifbench", "mmlu_redux")
"""Benchmarks of the paper's table in its order; the overall average is over these."""

CHAT, OVERALL = "Chat average", "Average"

MANY_GROUPS = 10**6
"""Groups of an average's interval: it has no single number, and needs no small-sample correction."""


@dataclass(frozen=True)
class Table:
    """A table of text: a title, the names of the columns, and rows as wide."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class _Cell:
    """A figure of one model, with what differences and averages are computed from."""

    interval: Interval
    samples: Floats
    groups: int

    def format(self, sign: bool = False) -> str:
        return self.interval.format(sign=sign) if not math.isnan(self.interval.value) else "–"


def build_tables(out: Path, results: Sequence[dict[str, Any]], difference: Sequence[str] | None) -> list[Table]:
    """Builds the table of figures and the table of counts.

    Args:
        out: Folder of the results.
        results: Results of one scoring.
        difference: Two models: a row has the first minus the second. None takes the only model that thinks and the only
            one that does not, if there is one of each.

    Raises:
        UserError: A column mixes what cannot be compared, or a model of `difference` is unknown.
    """
    names = _ordered({result["benchmark"] for result in results})
    by_place = {(result["benchmark"], result["model"]): result for result in results}
    models = list(dict.fromkeys(result["model"] for result in results))
    for name in names:
        _check_column([result for result in results if result["benchmark"] == name])
    cells = {place: _cell(out, result) for place, result in by_place.items()}
    all_averages = averaged(names, {result["benchmark"]: result["chat"] for result in results})
    averages = {title: of for title, of in all_averages.items() if len(of) > 1}
    for model in models:
        for title, members in averages.items():
            if all((name, model) in cells for name in members):
                cells[title, model] = _mean_cell([cells[name, model] for name in members])
    columns = [*names, *averages]
    rows = [[model, *(_text(cells.get((column, model))) for column in columns)] for model in models]
    if (pair := _pair(results, models, difference)) is not None:
        rows.append([f"{pair[0]} − {pair[1]}", *(_difference(cells, column, *pair) for column in columns)])
    titles = {result["benchmark"]: result["title"] for result in results}
    scoring = results[0]["scoring"]
    figures = Table(
        f"Scores with 95 % intervals, scoring {scoring}", ["model", *(titles.get(c, c) for c in columns)], rows
    )
    return [figures, _counts(results, names, models, by_place)]


def averaged(names: Sequence[str], chat: Mapping[str, bool]) -> dict[str, list[str]]:
    """The benchmarks whose main figures make each average.

    Args:
        names: Names of benchmarks with results.
        chat: Name → whether it is a chat benchmark.

    Returns:
        `CHAT` and `OVERALL` → names.
    """
    return {CHAT: [name for name in names if chat[name]], OVERALL: [name for name in names if name in PAPER_TABLE]}


def _ordered(names: set[str]) -> list[str]:
    """The paper's benchmarks in its order, then the others by name."""
    return sorted(names, key=lambda name: (PAPER_TABLE.index(name) if name in PAPER_TABLE else len(PAPER_TABLE), name))


def _check_column(results: Sequence[dict[str, Any]]) -> None:
    """Raises UserError if two results of a benchmark cannot be compared."""
    first = results[0]
    for other in results[1:]:
        for key, what in (("items", "other items"), ("judge", "another judge"), ("baseline", "another baseline")):
            if other[key] != first[key]:
                values = "" if key == "items" else f" ({other[key]}, not {first[key]})"
                raise UserError(
                    f"{first['benchmark']}: {other['model']} was scored with {what} than {first['model']}{values}; "
                    "evaluate both with the same options, or leave one out of --models."
                )


def _cell(out: Path, result: Mapping[str, Any]) -> _Cell:
    figure = next(iter(result["figures"].values()))
    return _Cell(Interval.from_json(figure), read_resamples(out, result), result.get("groups", result["n"]))


def _mean_cell(cells: Sequence[_Cell]) -> _Cell:
    """The mean of several benchmarks, whose resamples are independent."""
    samples: Floats = np.mean([cell.samples for cell in cells], axis=0)
    value = float(np.mean([cell.interval.value for cell in cells]))
    return _Cell(interval(value, samples, MANY_GROUPS), samples, MANY_GROUPS)


def _difference(cells: Mapping[tuple[str, str], _Cell], column: str, first: str, second: str) -> str:
    """The paired difference of two models in a column."""
    a, b = cells.get((column, first)), cells.get((column, second))
    if a is None or b is None:
        return "–"
    samples = a.samples - b.samples
    return _Cell(interval(a.interval.value - b.interval.value, samples, a.groups), samples, a.groups).format(sign=True)


def _text(cell: _Cell | None) -> str:
    return "–" if cell is None else cell.format()


def _pair(
    results: Sequence[dict[str, Any]], models: Sequence[str], difference: Sequence[str] | None
) -> tuple[str, str] | None:
    """The two models of the row of differences."""
    if difference is not None:
        if len(difference) != 2 or (unknown := [name for name in difference if name not in models]):
            wrong = f"{len(difference)} models" if len(difference) != 2 else f"{unknown[0]!r}, which has no results"
            raise UserError(f"--difference has {wrong}; give two of {', '.join(models)}.")
        return difference[0], difference[1]
    thinks = {result["model"]: result["format"] in ("think", "zero_think") for result in results}
    thinking, plain = ([model for model in models if thinks[model] is value] for value in (True, False))
    return (thinking[0], plain[0]) if len(thinking) == len(plain) == 1 else None


def _counts(
    results: Sequence[dict[str, Any]],
    names: Sequence[str],
    models: Sequence[str],
    by_place: Mapping[tuple[str, str], dict[str, Any]],
) -> Table:
    """Every figure with its counts, judge and baseline."""
    columns = ["benchmark", "model", "figures", "n", "malformed", "unparsed", "truncated", "thought", "response"]
    rows = []
    for result in (by_place[name, model] for name in names for model in models if (name, model) in by_place):
        figures = ", ".join(
            f"{name} {Interval.from_json(values).format()}" for name, values in result["figures"].items()
        )
        versions = ", ".join(version for version in result["judge_versions"] if version != result["judge"])
        judge = "rule" if result["judge"] is None else f"{result['judge']}{f' ({versions})' if versions else ''}"
        counts = [result["n"], result["malformed"], result["unparsed"], result["finish"].get("length", 0)]
        tokens = [
            "–" if (mean := result[f"{part}_tokens"]) is None else f"{mean:,.0f}" for part in ("thought", "response")
        ]
        rows.append(
            [result["title"], result["model"], figures, *(f"{count:,}" for count in counts), *tokens]
            + [judge, result["baseline"] or "–"]
        )
    return Table("Counts, and mean length in tokens", [*columns, "judge", "baseline"], rows)
