"""The state of a run in its folder, for `rlmt runs`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from time import monotonic, time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlmt.checkpointing.files import atomic_write
from rlmt.checkpointing.signals import StoppedBySignal
from rlmt.errors import UserError, first_line, own_error_message, user_error_text
from rlmt.report.run_states import STATE_FILE, State, StateRecord, lock_run

from ._common import is_dry_run, report_write_errors, run_folder
from .progress_bar import training_position

_EVERY = 5.0
"""Minimum number of seconds between two writes during training."""


class RunState(Callback):
    """Writes `state.json` beside metrics.csv: running, finished, interrupted or failed, and the step.

    `rlmt runs` reads it. The file appears after the first step and is written again at most every five seconds.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import RunState
        >>> trainer = Trainer(callbacks=[RunState()], logger=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._written = -math.inf
        self._lock: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the run's folder; a `fast_dev_run` leaves no files behind."""
        fitting = stage == "fit" and not is_dry_run(trainer)
        folder = run_folder(trainer) if fitting else None
        self._folder = folder if trainer.is_global_zero else None
        self._written = -math.inf

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the step, if the last write is old enough."""
        if monotonic() - self._written >= _EVERY:
            self._write(trainer, "running")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes that the run is finished."""
        self._write_end(trainer, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes that the run is interrupted, by a signal, or failed, and why."""
        if isinstance(exception, KeyboardInterrupt | StoppedBySignal | SIGTERMException):
            self._write_end(trainer, "interrupted")
        else:
            self._write_end(trainer, "failed", _reason(exception))

    def _write_end(self, trainer: Trainer, state: State, error: str | None = None) -> None:
        """Writes the end of a run and releases its lock; a start without a step leaves no file."""
        if self._written > -math.inf:
            self._write(trainer, state, error)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _write(self, trainer: Trainer, state: State, error: str | None = None) -> None:
        if self._folder is None:
            return
        done, total = training_position(trainer)
        steps = None if math.isinf(total) else int(total)
        record = StateRecord(state, step=int(done), steps=steps, updated=time(), error=error)
        with report_write_errors("run state"):
            with atomic_write(self._folder / STATE_FILE) as unfinished:
                unfinished.write_text(record.to_json(), encoding="utf-8")
            if self._lock is None:
                self._lock = lock_run(self._folder)
        self._written = monotonic()


def _reason(error: BaseException) -> str:
    """One line: why a run failed, as the command says it, or else the exception's first line."""
    if isinstance(error, UserError):
        return user_error_text(error)
    return own_error_message(error) or first_line(error)
