"""The newest checkpoint: saved every few steps, at the end, and when a run is stopped or fails."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from rlmt.checkpointing.csv_logger import ResumableCSVLogger
from rlmt.checkpointing.files import remove_unfinished
from rlmt.checkpointing.signals import SignalHandler, StoppedBySignal
from rlmt.checkpointing.snapshot import Snapshot
from rlmt.distributed import collectives
from rlmt.distributed.lightning_internals import (
    LoopStates,
    add_step_end_hook,
    dump_checkpoint,
    is_last_step,
    loops_after_step,
    loops_after_train_batch,
    loops_before_validation,
)
from rlmt.errors import AllRanksUserError, UserError
from rlmt.options import PositiveInt, check_ranges

from ._common import step_number


class PolicyCheckpoint(ModelCheckpoint):
    """Keeps one checkpoint, the newest, as `last.ckpt`: every N optimizer steps and at the end of training.

    A checkpoint is a snapshot at the end of a step: trained, logged and, if it was due, validated. A run resumed from
    it equals the uninterrupted run. Each checkpoint replaces the previous one atomically, so a kill at any time leaves
    a complete one.

    If the run fails or a signal stops it (Ctrl-C, SIGTERM, SLURM's preemption signal), the steps since the last
    checkpoint are saved, too. In a single process the run stops at once while the policy is unchanged since the last
    step, that is while rollouts are generated and scored and until the first optimizer step on them; otherwise at the
    end of the step. With several ranks all of them stop at the end of the step, whichever rank received the signal; and
    they save after an error only if all of them raise it, such as when no rollout server is left.

    Args:
        every_n_steps: Optimizer steps between checkpoints; several steps on one rollout batch are not split.
        dirpath: Folder; None is `checkpoints/` beside metrics.csv, so that no run overwrites the checkpoint of another.
        on_full: What to do if a checkpoint cannot be written, for example on a full disk: `stop` ends the run,
            `continue` warns and tries again after the next N steps. The previous checkpoint is kept in both cases.

    Raises:
        UserError: `every_n_steps` is not positive; during training, a checkpoint cannot be written.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import PolicyCheckpoint
        >>> trainer = Trainer(callbacks=[PolicyCheckpoint(every_n_steps=50)], logger=False, accelerator="cpu")
    """

    def __init__(
        self, every_n_steps: PositiveInt = 20, dirpath: str | None = None, on_full: Literal["stop", "continue"] = "stop"
    ) -> None:
        check_ranges(PolicyCheckpoint, locals())
        super().__init__(dirpath, filename=self.CHECKPOINT_NAME_LAST, every_n_train_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self.on_full = on_full
        self._signals = SignalHandler(self._can_save)
        self._trainer: Trainer | None = None
        self._loops: LoopStates | None = None
        self._step = 0
        self._snapshot: Snapshot | None = None
        self._saved: Snapshot | None = None
        self._steps_saved = 0
        self._writing = False

    def state_dict(self) -> dict[str, Any]:
        """Empty: a checkpoint does not depend on earlier ones."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes unfinished files that a kill left."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and self.dirpath:
            remove_unfinished(Path(self.dirpath))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs the signal handlers and the hook at the end of each step."""
        super().on_train_start(trainer, pl_module)
        self._trainer, self._snapshot, self._saved = trainer, None, None
        self._steps_saved = trainer.global_step
        add_step_end_hook(trainer, lambda: self._on_step_end(trainer))
        self._signals.install(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records the state of the loops."""
        self._loops, self._step = loops_after_train_batch(trainer), step_number(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The step is logged: a snapshot with the validation still due is possible, unless it is the last step."""
        within_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
        if within_fit and self._loops is not None and not is_last_step(trainer):
            self._snapshot = Snapshot.take(trainer, loops_before_validation(self._loops), self._step)
            self._stop_if_signalled(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Until the end of the step loggers and callbacks process the validation's results; no snapshot is valid."""
        self._snapshot = None

    def _on_step_end(self, trainer: Trainer) -> None:
        if self._loops is None:
            return  # the validation at the start of a resumed run
        self._snapshot, self._loops = Snapshot.take(trainer, loops_after_step(self._loops, trainer), self._step), None
        if trainer.global_step // self.every_n_steps > self._steps_saved // self.every_n_steps:
            self._save(trainer, may_fail=self.on_full == "continue")
        if not is_last_step(trainer):
            self._stop_if_signalled(trainer)

    def _stop_if_signalled(self, trainer: Trainer) -> None:
        # All ranks stop in the same step, although a signal may have reached one of them only.
        if received := max(collectives.all_gather_object(self._signals.received or 0)):
            self._signals.received = received
            if trainer.world_size > 1 and self._snapshot is not self._saved:
                self._save(
                    trainer, may_fail=True
                )  # here, where all ranks take part; during the exit a rank would be alone
            self._signals.check(shared=True)

    def _is_current(self) -> bool:
        """Whether the snapshot has the current weights and optimizer state."""
        trainer, snapshot = self._trainer, self._snapshot
        if trainer is None or snapshot is None or self._writing:
            return False
        return snapshot.matches_weights(trainer)

    def _can_save(self) -> bool:
        return self._is_current() and self._trainer is not None and self._trainer.world_size == 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the steps since the last checkpoint."""
        self._signals.restore()
        if self._snapshot is not None and self._snapshot is not self._saved:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does nothing: the end of an epoch is the end of a step."""

    on_validation_end = on_train_epoch_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves the steps since the last checkpoint if possible, and prints how to resume."""
        possible = self._can_save() or (isinstance(exception, AllRanksUserError) and self._is_current())
        if possible and self._snapshot is not self._saved and not isinstance(exception, _CheckpointNotWritten):
            self._save(trainer, may_fail=True)
        self._signals.restore()
        if trainer.is_global_zero:
            self._signals.requeue()
        if self._saved is not None and trainer.is_global_zero:
            error = "stopped" if isinstance(exception, UserError) else type(exception).__name__
            name = exception.signal.name if isinstance(exception, StoppedBySignal) else error
            count = self._saved.step + 1  # as the progress bar counts; steps in metrics.csv begin at 0
            steps = "the first step" if count == 1 else f"the first {count} steps"
            print(
                f"rlmt: {name}: {self.best_model_path} has {steps}; the same command with --ckpt_path last resumes "
                "from there.",
                file=sys.stderr,
            )

    def _save(self, trainer: Trainer, may_fail: bool = False) -> None:
        """Writes the current snapshot.

        Raises:
            UserError: It cannot be written, and `may_fail` is not set.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        snapshot = self._snapshot
        assert snapshot is not None and self.dirpath is not None
        path = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        checkpoint: dict[str, Any] = {}
        self._writing = True
        try:
            failure = _failure(lambda: checkpoint.update(_checkpoint(trainer, snapshot)))
            # Ranks gather their parts of the snapshot, so all of them or none.
            failure = failure or _failure(lambda: snapshot.update_checkpoint(checkpoint))
            # After every rank has written the rollouts that belong to the checkpoint.
            failure = failure or _failure(lambda: trainer.strategy.save_checkpoint(checkpoint, path))
        finally:
            self._writing = False
        if failure:
            why = f"{path} cannot be written ({failure})"
            if not may_fail:
                raise _CheckpointNotWritten(
                    f"{why}; the previous checkpoint is complete. Free disk space, and resume with --ckpt_path last.",
                    reported_elsewhere=collectives.rank() > 0,
                )
            rank_zero_warn(f"{why}; the previous checkpoint is complete.")
            return
        self._saved, self._steps_saved = snapshot, trainer.global_step
        self.best_model_path = str(path)


def _checkpoint(trainer: Trainer, snapshot: Snapshot) -> dict[str, Any]:
    """The checkpoint of a snapshot; callbacks write the files that belong to it."""
    checkpoint = dump_checkpoint(trainer)
    log = next((logger for logger in trainer.loggers if isinstance(logger, ResumableCSVLogger)), None)
    checkpoint["run"] = {"version": log.version if log else None, "step": snapshot.step}
    return checkpoint


def _failure(work: Callable[[], None]) -> str:
    """Runs work that writes; returns why it failed on any rank, or "". All ranks have to call it."""
    reason = ""
    try:
        work()
    except OSError as error:
        reason = error.strerror or str(error)
    return max(collectives.all_gather_object(reason))


class _CheckpointNotWritten(AllRanksUserError):
    """A checkpoint could not be written; the exit does not try again."""
