"""What all callbacks share: where a run's files go, which step it is, and one way to log and to print."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from tqdm import tqdm

from rlmt.types import Experience


def experience_of(outputs: Any) -> Experience:
    """The `Experience` in what a step of `RLMTModule` returned.

    Raises:
        TypeError: The module's step returned something else, so this callback does not belong in its trainer.
    """
    experience = outputs.get("experience") if isinstance(outputs, Mapping) else None
    if not isinstance(experience, Experience):
        raise TypeError('rlmt callbacks want a module whose steps return {"experience": Experience, ...}')
    return experience


def metrics_of(outputs: Any) -> dict[str, float]:
    """The scalars in what a training step of `RLMTModule` returned, under their final names."""
    return {name: float(value) for name, value in outputs.get("metrics", {}).items()}


def run_folder(trainer: Trainer) -> Path:
    """The folder of metrics.csv, or else the first logger's, or else `default_root_dir`.

    Every rank has to call it, because rank 0's answer is broadcast: so call it in `setup`, not when handling an error.
    """
    csv = next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
    folder = trainer.log_dir if csv is None else trainer.strategy.broadcast(csv.log_dir)
    return Path(folder or trainer.default_root_dir)


def is_dry_run(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`, which has no loggers and should leave no files behind."""
    return bool(getattr(trainer, "fast_dev_run", False))


def step_number(trainer: Trainer) -> int:
    """The current rollout step, counted from 0 over all epochs: the `step` column of metrics.csv.

    `Trainer.global_step` counts optimizer steps instead, of which one rollout may take several. Lightning has no public
    name for this count; its own LearningRateMonitor reads the same attribute.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def over_ranks(trainer: Trainer, pl_module: LightningModule, metrics: Mapping[str, float]) -> dict[str, float]:
    """Merges each rank's metrics in one collective; every rank calls it with the same names.

    Names ending in `_max` take the largest value, `perf/tokens_per_s` the sum, all others the mean over the ranks whose
    value is not NaN.
    """
    if trainer.world_size == 1 or not metrics:
        return dict(metrics)
    local = torch.tensor(list(metrics.values()), dtype=torch.float32, device=pl_module.device)
    ranks = trainer.strategy.all_gather(local).reshape(trainer.world_size, -1)
    merged: dict[str, float] = {}
    for name, values in zip(metrics, ranks.unbind(dim=1), strict=True):
        if name.endswith("_max"):
            merged[name] = float(values.max())
        elif name == "perf/tokens_per_s":
            merged[name] = float(values.sum())
        else:
            merged[name] = float(values.nanmean())
    return merged


def log_step(
    pl_module: LightningModule, metrics: Mapping[str, float], batch_size: int, bar: Mapping[str, float] | None = None
) -> None:
    """Logs a step's metrics to every logger, and those in `bar` to the progress bar alone, under short names."""
    for name, value in metrics.items():
        pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=batch_size)
    for name, value in (bar or {}).items():
        pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=batch_size, prog_bar=True, logger=False)


def say(text: str) -> None:
    """Prints above a live progress bar: tqdm's is moved out of the way, and rich's redirects stdout by itself."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    tqdm.write(text.encode(encoding, "replace").decode(encoding), file=sys.stdout)


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Around what is written while a run fails: a disk that is full must not hide why, nor keep others from saving."""
    try:
        yield
    except OSError as error:
        say(f"{what} cannot be written: {error}")


def format_of(pl_module: LightningModule) -> dict[str, Any] | None:
    """The module's thinking format as a dict, to travel with the files; None for a module without one."""
    thinking: Any = getattr(pl_module, "format", None)
    return None if thinking is None else dict(thinking.to_dict())
