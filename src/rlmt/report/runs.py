"""The runs of a page: found by their folders, and read from the files that a run leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from rlmt.checkpointing.config_changes import CONFIG_FILE, flatten
from rlmt.checkpointing.csv_logger import LATEST
from rlmt.checkpointing.run_record import read_record
from rlmt.errors import UserError
from rlmt.report import run_states
from rlmt.report.run_states import METRICS_FILE
from rlmt.report.series import Series, read_metrics
from rlmt.report.verdicts import Verdict, verdicts

_SEED = ("seed_everything", "data.seed")
_NOT_COMPARED = (*_SEED, "trainer.default_root_dir", "trainer.logger", "trainer.enable_", "trainer.callbacks")
"""Prefixes of options that may differ between two seeds of one arm."""
_NAMED_BY = ("model.format", "model.algorithm", "model.reward", "model.policy", "model.model", "model.optimizer.lr")
"""Options that name an arm, the first one that tells all arms apart."""


@dataclass(frozen=True)
class Run:
    """Everything that a page shows of one run."""

    folder: Path
    label: str
    """Name on the page; unique."""
    arm: str
    """Runs of one arm differ in their seeds alone."""
    metrics: dict[str, Series] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    """Option, as on the command line → value; empty without config.yaml."""
    record: dict[str, Any] = field(default_factory=dict)
    """Command and versions; empty for runs that have none."""
    state: str = "unknown"
    """running, finished, interrupted or failed; unknown for runs that have no state file."""
    done: int | None = None
    """Steps done as `rlmt runs` counts them; None if unknown."""
    planned: int | None = None
    """Their total; None if nothing ends the run, or if unknown."""

    @property
    def seed(self) -> int | None:
        """The run's seed, if its configuration has one."""
        seed = self.config.get("seed_everything")
        return None if seed is None else int(seed)

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdicts on its metrics."""
        return verdicts(self.metrics, float32=self.config.get("trainer.precision") in (None, "32-true", 32, "32"))


def find_run(path: Path) -> Path:
    """Finds the folder of a run's metrics.csv.

    Args:
        path: That folder, a file in it, or its parent, of which the newest training run is taken.

    Raises:
        UserError: There is no run.
    """
    folder = path.parent if path.is_file() else path
    if not folder.exists():
        raise UserError(f"{path}: the folder does not exist; pass the folder of a run, such as runs/tiny/run.")
    candidates = [folder, folder / LATEST, *sorted(_versions(folder), key=_number, reverse=True)]
    for candidate in candidates:
        if (candidate / METRICS_FILE).is_file():
            return candidate.resolve()
    raise UserError(f"{path}: no metrics.csv was found; pass a folder that `rlmt fit` wrote, or its version_N.")


def _versions(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("version_*") if path.name.partition("_")[2].isdigit())


def _number(version: Path) -> int:
    return int(version.name.partition("_")[2])


def read_run(path: Path, label: str | None = None, arm: str | None = None) -> Run:
    """Reads one run.

    Args:
        path: As for `find_run`.
        label: Name on the page; None takes the folder's.
        arm: Runs of one arm are shown as one curve with a band; None gives the run an arm of its own.

    Raises:
        UserError: There is no run, or its metrics.csv has no metric yet.
    """
    folder = find_run(path)
    metrics = read_metrics(folder / METRICS_FILE)
    if not metrics:
        raise UserError(f"{folder / METRICS_FILE}: holds no metrics yet; wait for the first step of the run.")
    file = folder / CONFIG_FILE
    config = dict(flatten(yaml.safe_load(file.read_text(encoding="utf-8")) or {})) if file.is_file() else {}
    named = folder.parent.name if folder.name.startswith("version_") else folder.name
    label = label or named
    listed = run_states.read_run(folder)
    run = Run(folder, label, arm or label, metrics, config, read_record(folder))
    if listed is not None and listed.state is not None:
        return replace(run, state=listed.state, done=listed.step, planned=listed.steps)
    return run


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads several runs, and groups those that differ in their seeds alone into arms.

    Raises:
        UserError: A path has no run, or two paths are the same run.
    """
    runs = [read_run(path) for path in paths]
    for i, run in enumerate(runs):
        if any(run.folder == other.folder for other in runs[:i]):
            raise UserError(f"{paths[i]}: this run is given twice; pass each run once.")
    if len(runs) == 1:
        return runs
    keys = [_compared(run) for run in runs]
    names = _arm_names(runs, keys)
    runs = [replace(run, arm=names[keys.index(key)]) for run, key in zip(runs, keys, strict=True)]
    labels = [_label(run, runs) for run in runs]
    unique = [f"{label} ({i + 1})" if labels.count(label) > 1 else label for i, label in enumerate(labels)]
    return [replace(run, label=label) for run, label in zip(runs, unique, strict=True)]


def _compared(run: Run) -> str:
    """The options of a run that are equal for all seeds of an arm; the folder of one without a configuration."""
    options = {name: value for name, value in run.config.items() if not name.startswith(_NOT_COMPARED)}
    return json.dumps(options, sort_keys=True, default=str) if options else str(run.folder)


def _arm_names(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    """A name for the arm of each run: the value of the option that tells all arms apart, or else the folder's name."""
    firsts = [runs[keys.index(key)] for key in dict.fromkeys(keys)]
    for option in _NAMED_BY:
        values = [_short(run.config.get(option)) for run in firsts]
        if len(firsts) > 1 and all(values) and len(set(values)) == len(values):
            by_key = dict(zip(dict.fromkeys(keys), values, strict=True))
            return [by_key[key] for key in keys]
    return [run.label for run in (runs[keys.index(key)] for key in keys)]


def _short(value: Any) -> str:
    """The last part of a class or path."""
    return "" if value is None else str(value).rstrip("/").rpartition("/")[2].rpartition(".")[2] or str(value)


def _label(run: Run, runs: Sequence[Run]) -> str:
    """The arm, with the seed if the arm has several runs."""
    several = sum(other.arm == run.arm for other in runs) > 1
    return f"{run.arm}, seed {run.seed}" if several and run.seed is not None else run.arm
