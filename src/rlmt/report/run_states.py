"""The runs in a folder: state, step, latest metrics and age of each, read from the files that a run writes.

It imports neither torch nor Lightning, so that `rlmt runs` answers at once.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from rlmt.report.series import read_lines, read_metrics
from rlmt.report.verdicts import State as VerdictState
from rlmt.report.verdicts import verdicts, worst

STATE_FILE = "state.json"
"""File in a run's folder with its state, which `rlmt.callbacks.RunState` writes."""
LOCK_FILE = ".run.lock"
"""File in a run's folder that the running process locks."""
METRICS_FILE = "metrics.csv"
CONFIG_FILE = "config.yaml"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where it is built: ten times as fast

REPORTED = {
    "reward": ("val/reward_mean", "reward/mean"),
    "thought": ("val/thought_tokens", "length/thought_mean"),
    "response": ("val/response_tokens", "length/response_mean"),
    "loss": ("val/loss", "sft/loss", "rm/loss"),
    "accuracy": ("val/accuracy", "rm/accuracy"),
}
"""What is reported of a run → the metric of held-out data, and those of training that replace it without any."""

State = Literal["running", "finished", "interrupted", "failed"]
Row = dict[str, float]
"""Metric → value of one line of metrics.csv, without empty cells."""


@dataclass(frozen=True)
class StateRecord:
    """What a run writes about itself."""

    state: State
    step: int
    """Steps done: optimizer steps where `max_steps` ends the run, else batches."""
    steps: int | None
    """Their total; None if nothing ends the run."""
    updated: float
    """Unix time of the last change."""
    error: str | None = None
    """Why the run failed; None if it did not."""

    def to_json(self) -> str:
        """The record as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class Run:
    """A training run as `rlmt runs` lists it."""

    folder: Path
    """The `version_N` folder."""
    state: State | None
    """None of runs without a state file, such as those of an earlier version."""
    step: int
    steps: int | None
    updated: float
    """Unix time of the last step."""
    metrics: Mapping[str, float]
    """Metric → its last logged value."""
    error: str | None = None
    verdict: str = ""
    """`ok`, or the worst state of the checks of `rlmt report` and their names; empty before any is known."""

    def reported(self, name: str) -> tuple[str, float] | None:
        """Metric and last value of what `REPORTED` names, held-out data first; None if none of them was logged."""
        return next(((metric, self.metrics[metric]) for metric in REPORTED[name] if metric in self.metrics), None)


def find_runs(root: Path) -> list[Run]:
    """Reads the training runs in a folder and in the folders below it, the newest first.

    Args:
        root: Folder to search; links are not followed, and nothing is searched inside of a run's folder.
    """
    runs = [run for folder in _run_folders(root) if (run := read_run(folder)) is not None]
    return sorted(runs, key=lambda run: run.updated, reverse=True)


def _run_folders(root: Path) -> Iterator[Path]:
    """Folders with the files of a run."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if METRICS_FILE in files or STATE_FILE in files:
            subfolders.clear()
            yield Path(folder)


def read_run(folder: Path) -> Run | None:
    """Reads one run.

    Args:
        folder: Folder of its metrics.csv.

    Returns:
        The run; None if nothing was trained in the folder, as by `rlmt validate`.
    """
    record, path = read_state(folder), folder / METRICS_FILE
    stat = path.stat() if path.is_file() else None
    rows = _rows(path, stat.st_mtime_ns, stat.st_size) if stat else ()
    metrics = {name: value for row in rows for name, value in row.items()}
    trained = any(name in metrics for names in REPORTED.values() for name in names[1:])
    if record is None and not trained:
        return None
    logged = 0.0 if stat is None else stat.st_mtime
    verdict = _verdict(folder, stat.st_mtime_ns, stat.st_size) if stat else ""
    if record is None:
        return Run(folder, None, int(metrics.get("step", -1)) + 1, None, logged, metrics, verdict=verdict)
    killed = record.state == "running" and not is_locked(folder)  # it could not write that it was interrupted
    state: State = "interrupted" if killed else record.state
    return Run(folder, state, record.step, record.steps, max(record.updated, logged), metrics, record.error, verdict)


def read_state(folder: Path) -> StateRecord | None:
    """Reads what a run wrote about itself; None if there is no such file, or it is of another version."""
    try:
        values: Any = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return StateRecord(**values)
    except (OSError, ValueError, TypeError):
        return None


def read_rows(path: Path) -> list[Row]:
    """Reads the lines of a metrics.csv; a line that is being written is left out.

    Args:
        path: The file.

    Returns:
        The lines, in the order in which they were logged.
    """
    numbers = [{name: _number(cell) for name, cell in line.items() if cell} for line in read_lines(path)]
    return [{name: value for name, value in line.items() if value is not None} for line in numbers]


def _number(cell: str) -> float | None:
    """The number in a cell, nan included; None for other text, such as in another program's metrics.csv."""
    try:
        return float(cell)
    except ValueError:
        return None


@lru_cache(maxsize=1024)
def _rows(path: Path, changed: int, size: int) -> tuple[Row, ...]:
    """As `read_rows`, once for each state of the file."""
    return tuple(read_rows(path))


@lru_cache(maxsize=1024)
def _verdict(folder: Path, changed: int, size: int) -> str:
    """`ok` or `watch: Entropy, Lengths`, once for each state of metrics.csv."""
    config = folder / CONFIG_FILE
    options = yaml.load(config.read_text(encoding="utf-8"), _Loader) if config.is_file() else {}
    precision = (options.get("trainer") or {}).get("precision") if isinstance(options, dict) else None
    found = verdicts(read_metrics(folder / METRICS_FILE), float32=precision in (None, "32-true", 32, "32"))
    state = worst(found)
    if state in (VerdictState.OK, VerdictState.UNKNOWN):
        return "ok" if state is VerdictState.OK else ""
    return f"{state}: {', '.join(verdict.check.title for verdict in found if verdict.state is state)}"


def lock_run(folder: Path) -> int:
    """Locks a run's folder as long as this process lives, and returns the file descriptor to close.

    So a run that was killed can be distinguished from a running one, whatever its process id, container and machine.
    """
    lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_SH)  # waits for a reader, who holds the other kind for some microseconds
    return lock


def is_locked(folder: Path) -> bool:
    """Whether a living process has locked a run's folder."""
    try:
        lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: what the run has written is all that is known
        return True
    finally:
        os.close(lock)
    return False


def finite(value: float | None) -> float | None:
    """A value for JSON, which has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None
