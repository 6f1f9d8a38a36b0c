"""The data of a page: everything that its script shows, as JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import metadata
from typing import Any

import numpy as np

import rlmt
from rlmt.report import configuration, panels
from rlmt.report.distributions import distributions
from rlmt.report.rollout_sample import choose, numbers, read_chosen, rollout_files, shared_prompts
from rlmt.report.runs import Run
from rlmt.report.series import Series
from rlmt.report.verdicts import Verdict, worst

ROLLOUT_BYTES = 2_200_000
"""Compressed bytes of rollout texts on a page, shared by its runs; base64 adds a third."""
_POINTS = 2000
"""Most points of a curve on a page with one run; several runs share three times as many."""


def payload(runs: Sequence[Run]) -> dict[str, Any]:
    """The data of the runs.

    Args:
        runs: The runs; without any the page has the sections of its caller alone.
    """
    logged = {name for run in runs for name in run.metrics}
    columns = {run.label: numbers(run.folder) for run in runs if rollout_files(run.folder)}
    follow = shared_prompts(list(columns.values()))
    points = max(200, min(_POINTS, 3 * _POINTS // max(1, len(runs))))
    return {
        "version": rlmt.__version__,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "docs": _docs_url(),
        "families": panels.FAMILIES,
        "panels": [asdict(panel) for panel in panels.panels(logged)],
        "differences": {"runs": [run.label for run in runs], "rows": configuration.differences(runs)},
        "runs": [_run(run, points, columns.get(run.label), follow, ROLLOUT_BYTES // len(runs)) for run in runs],
    }


def _run(
    run: Run, points: int, columns: Mapping[str, Any] | None, follow: Sequence[int], budget: int
) -> dict[str, Any]:
    """The data of one run; `columns` are the numbers of its rollouts, None without any."""
    found = run.verdicts
    data: dict[str, Any] = {
        "label": run.label,
        "arm": run.arm,
        "seed": run.seed,
        "state": run.state,
        "steps": int(max(series.steps[-1] for series in run.metrics.values())) + 1 if run.done is None else run.done,
        "planned": run.planned,
        "metrics": {name: _series(series, points) for name, series in run.metrics.items()},
        "verdict": str(worst(found)),
        "verdicts": [_verdict(verdict) for verdict in found],
        "settings": configuration.own_settings(run),
        "facts": configuration.facts(run),
        "command": configuration.repeat_command(run),
        "config": configuration.whole(run),
        "rollouts": None,
        "distributions": None,
    }
    if columns is not None:
        seed = run.seed or 0
        picked = read_chosen(run.folder, choose(columns, seed, follow), budget)
        data["rollouts"] = {"rows": picked.rows, "prompts": picked.prompts, "total": picked.total}
        training = {name: values[~columns["held_out"]] for name, values in columns.items()}
        data["distributions"] = distributions(training, seed) if len(training["step"]) else None
    return data


def _series(series: Series, points: int) -> list[list[float | int]]:
    """Steps and values with six digits; more than `points` of them are averaged over neighbours."""
    steps, values = series.steps, series.values
    if len(series) > points:
        steps = np.array([part.mean().round() for part in np.array_split(steps, points)])
        values = np.array([part.mean() for part in np.array_split(values, points)])
    return [[int(step) for step in steps], [float(f"{value:.6g}") for value in values]]


def _verdict(verdict: Verdict) -> dict[str, Any]:
    """A verdict with what to say about it."""
    check = verdict.check
    return {
        "key": check.key,
        "title": check.title,
        "state": str(verdict.state),
        "number": verdict.reading.text,
        "metric": verdict.reading.metric,
        "limits": f"Compared: {check.measures}. Watch above {check.watch:g}, problem from {check.problem:g}.",
        "why": check.why,
        "advice": check.advice,
        "anchor": check.anchor,
    }


def _docs_url() -> str:
    """Address of the documentation site, if the installed package names one."""
    try:
        urls = metadata("rlmt").get_all("Project-URL") or []
    except ModuleNotFoundError:  # a checkout on PYTHONPATH
        return ""
    named: dict[str, str] = dict(url.split(", ", 1) for url in urls if ", " in url)
    return named.get("Documentation", "")
