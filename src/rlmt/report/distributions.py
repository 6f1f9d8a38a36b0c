"""Distributions of reward and lengths over the steps of a run, from the numbers of all its rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

QUANTITIES = {"reward": "reward", "thought": "thought_tokens", "response": "response_tokens"}
"""Name on the page → column of the rollouts."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MAX_BINS, _BARS, _POINTS = 60, 24, 80
"""Groups of steps, bars of a histogram, and points of reward against length in a group."""


def distributions(columns: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """Quantiles, histograms and points for each group of neighbouring steps.

    Args:
        columns: Numbers of all rollouts, one array a column.
        seed: Seed of the choice of points.

    Returns:
        `steps`, the [first, last] of each group; for each quantity `quantiles` ([5, n] by group), `edges` of the
        histogram's bars and `counts` ([n, bars]); and `points`, for each group [response tokens, reward] pairs.
    """
    rng = np.random.default_rng(seed)
    order = np.argsort(columns["step"], kind="stable")
    steps = np.unique(columns["step"])
    groups = np.array_split(steps, min(_MAX_BINS, len(steps)))
    starts = np.searchsorted(columns["step"][order], [group[0] for group in groups])
    rows = np.split(order, starts[1:])
    found: dict[str, Any] = {"steps": [[int(group[0]), int(group[-1])] for group in groups]}
    for name, column in QUANTITIES.items():
        found[name] = _of_quantity(np.asarray(columns[column], dtype=np.float64), rows)
    reward, response = columns["reward"], columns["response_tokens"]
    found["points"] = []
    for group in rows:
        known = group[np.isfinite(reward[group])]
        shown = np.sort(rng.permutation(known)[:_POINTS])
        found["points"].append([[int(response[row]), _round(reward[row])] for row in shown])
    return found


def _of_quantity(values: Array, rows: list[Any]) -> dict[str, Any]:
    """Quantiles and histograms of one quantity by group of steps."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, _BARS + 1)
    by_group = [values[group][np.isfinite(values[group])] for group in rows]
    quantiles = [np.quantile(group, QUANTILES) if len(group) else np.full(len(QUANTILES), np.nan) for group in by_group]
    return {
        "quantiles": [[_round(value) for value in line] for line in np.array(quantiles).T],
        "edges": [_round(edge) for edge in edges],
        "counts": [np.histogram(group, edges)[0].tolist() for group in by_group],
    }


def _round(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None
