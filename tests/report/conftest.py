"""Synthetic runs: a folder with metrics.csv, config.yaml, run.json and rollouts, written in milliseconds."""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from rlmt.engines.rollout_files import SCHEMA, write_rollouts
from rlmt.report.series import Series


def healthy(steps: int = 40, seed: int = 0) -> dict[str, list[float]]:
    """Metrics of a run that trips no verdict; validation at every tenth step."""
    rng = np.random.default_rng(seed)
    at = np.arange(steps)
    rise = 1 - np.exp(-at / 10)
    held_out = np.where(at % 10 == 9, rise, math.nan)
    return {
        "reward/mean": (2 * rise + rng.normal(0, 0.05, steps)).tolist(),
        "reward/std": [1.0] * steps,
        "reward/zero_std_groups": [0.1] * steps,
        "reward/malformed": [0.02] * steps,
        "length/thought_mean": (40 + at).tolist(),
        "length/thought_p95": (80 + at).tolist(),
        "length/response_mean": [100.0] * steps,
        "length/truncated": [0.01] * steps,
        "policy/kl": (0.001 * at).tolist(),
        "policy/entropy": (2 - 0.01 * at).tolist(),
        "policy/clip_low": [0.01] * steps,
        "policy/clip_high": [0.02] * steps,
        "engine/mismatch_max": [0.002] * steps,
        "time/rollout_s": [2.0] * steps,
        "time/update_s": [3.0] * steps,
        "time/step_s": [5.5] * steps,
        "perf/tokens_per_s": [400.0] * steps,
        "val/reward_mean": held_out.tolist(),
        "val/rubric": (held_out / 2).tolist(),
    }


def rollout_rows(steps: int, prompts: int = 2, group_size: int = 3, text: str = "") -> list[dict[str, Any]]:
    """Rows of a rollout file: every prompt at every step; the last sample of each step is malformed."""
    rows = []
    for step in range(steps):
        for prompt in range(prompts):
            for sample in range(group_size):
                ok = (prompt, sample) != (prompts - 1, group_size - 1)
                thought, response = f"thought {step} {text}".strip(), f"response {step} {prompt} {sample}"
                row = dict.fromkeys(SCHEMA.names)
                row |= {"step": step, "rank": 0, "epoch": 0, "group": prompt, "sample": sample, "prompt_index": prompt}
                row |= {"messages": [{"role": "user", "content": f"question {prompt}"}]}
                row |= {
                    "text": f"<think>{thought}</think>{response}" if ok else f"<think>{thought}",
                    "truncated": not ok,
                }
                row |= {"thought": thought if ok else "", "response": response if ok else ""}
                row |= {
                    "status": "ok" if ok else "unclosed",
                    "thought_tokens": 10 + step,
                    "response_tokens": 5 + sample,
                }
                row |= {"reward": step + sample / 10 if ok else -2.0, "reward_parts": [("rm", 0.5 if ok else math.nan)]}
                rows.append(row)
    return rows


def write_run(
    folder: Path,
    metrics: Mapping[str, Sequence[float]] | None = None,
    rollouts: Sequence[dict[str, Any]] | None = None,
    config: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the files of a run and returns its folder `version_0`."""
    folder = folder / "version_0"
    folder.mkdir(parents=True)
    metrics = healthy() if metrics is None else metrics
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *metrics])
        for step, values in enumerate(zip(*metrics.values(), strict=True)):
            writer.writerow([step, *("" if math.isnan(value) else value for value in values)])
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))
    if rollouts is not None:
        write_rollouts(pa.Table.from_pylist(list(rollouts), SCHEMA), folder / "rollouts/rollouts_000000-000009.parquet")
    return folder


def series(values: Sequence[float]) -> Series:
    """A series from step 0 on without its NaNs."""
    array = np.asarray(values, dtype=np.float64)
    known = np.isfinite(array)
    return Series(np.arange(len(array), dtype=np.float64)[known], array[known])


@pytest.fixture(scope="session")
def synthetic() -> Any:
    """The functions of this file; test folders are no packages, so tests cannot import it."""
    from types import SimpleNamespace

    def metrics(**changes: Callable[[np.ndarray], np.ndarray] | Sequence[float] | None) -> dict[str, Series]:
        """A healthy run's metrics with some replaced; `__` stands for `/`; None removes one."""
        named = healthy() | {name.replace("__", "/"): values for name, values in changes.items()}
        return {name: series(values) for name, values in named.items() if values is not None}

    return SimpleNamespace(healthy=healthy, rows=rollout_rows, write=write_run, metrics=metrics)
