"""The newest checkpoint: written every few steps, at the end, and when a run is stopped or fails."""

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

    A checkpoint is of a whole step: trained, logged and, where that was due, validated; going on from it is the run
    that was not broken off. Each replaces the one before at once, so a kill at any moment leaves a whole one.

    When the run fails or a signal stops it (Ctrl-C, SIGTERM, SLURM's preemption signal), what was done since the last
    checkpoint is saved as well. A signal is obeyed at once while the policy is as the last step left it, which it is
    while samples are drawn and scored and until the first optimizer step on them; else when the step ends. On several
    processes it is obeyed when the step ends, by all of them, whichever it reached; and only a failure that all of them
    know of, such as that no rollout server is left, has them save.

    Args:
        every_n_steps: Optimizer steps between checkpoints; a step of several on one rollout batch is not cut.
        dirpath: Folder; None is `checkpoints/` in the run's folder.
        on_full: What to do where a checkpoint cannot be written, as on a full disk: `stop` ends the run, `continue`
            warns and tries again after the next N steps. The checkpoint before it stays either way.

    Raises:
        UserError: `every_n_steps` is not positive; while training, a checkpoint cannot be written.

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
        self._stopping = SignalHandler(self._savable)
        self._trainer: Trainer | None = None
        self._loops: LoopStates | None = None
        self._step = 0
        self._moment: Snapshot | None = None
        self._saved: Snapshot | None = None
        self._steps_saved = 0
        self._writing = False

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a checkpoint does not depend on the ones before it."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes what a kill left half-written."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and self.dirpath:
            remove_unfinished(Path(self.dirpath))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens to signals, and from now on sees the end of each step, which Lightning has no hook for."""
        super().on_train_start(trainer, pl_module)
        self._trainer, self._moment, self._saved = trainer, None, None
        self._steps_saved = trainer.global_step
        add_step_end_hook(trainer, lambda: self._on_step_end(trainer))
        self._stopping.listen(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes where the loops stand."""
        self._loops, self._step = loops_after_train_batch(trainer), step_number(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The step is logged: the run can be saved with its validation still to come, unless it is the last one."""
        within_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
        if within_fit and self._loops is not None and not is_last_step(trainer):
            self._moment = Snapshot.of(trainer, loops_before_validation(self._loops), self._step)
            self._stop_if_asked(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here to the end of the step the validation's results are on their way to loggers and callbacks."""
        self._moment = None

    def _on_step_end(self, trainer: Trainer) -> None:
        if self._loops is None:
            return  # a validation that a resumed run began with
        self._moment, self._loops = Snapshot.of(trainer, loops_after_step(self._loops, trainer), self._step), None
        if trainer.global_step // self.every_n_steps > self._steps_saved // self.every_n_steps:
            self._save(trainer, may_fail=self.on_full == "continue")
        if not is_last_step(trainer):
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        # Every rank or none: they are in the same step, and a signal may have reached one alone.
        if asked := max(collectives.all_gather_object(self._stopping.asked or 0)):
            self._stopping.asked = asked
            if trainer.world_size > 1 and self._moment is not self._saved:
                self._save(trainer, may_fail=True)  # here, together; while leaving, a rank would be on its own
            self._stopping.check(shared=True)

    def _stands(self) -> bool:
        trainer, moment = self._trainer, self._moment
        return trainer is not None and moment is not None and not self._writing and moment.is_now(trainer)

    def _savable(self) -> bool:
        return self._stands() and self._trainer is not None and self._trainer.world_size == 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the steps since the last checkpoint."""
        self._stopping.leave()
        if self._moment is not None and self._moment is not self._saved:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the last step of an epoch is a step."""

    on_validation_end = on_train_epoch_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves the steps since the last checkpoint, if it can be done, and tells where to go on from."""
        possible = self._savable() or (isinstance(exception, AllRanksUserError) and self._stands())
        if possible and self._moment is not self._saved and not isinstance(exception, _NotWritten):
            self._save(trainer, may_fail=True)
        self._stopping.leave()
        if trainer.is_global_zero:
            self._stopping.requeue()
        if self._saved is not None and trainer.is_global_zero:
            error = "stopped" if isinstance(exception, UserError) else type(exception).__name__
            name = exception.signal.name if isinstance(exception, StoppedBySignal) else error
            print(
                f"rlmt: {name}: {self.best_model_path} holds all up to step {self._saved.step}; the same command with "
                "--ckpt_path last goes on from there",
                file=sys.stderr,
            )

    def _save(self, trainer: Trainer, may_fail: bool = False) -> None:
        """Writes the present moment.

        Raises:
            UserError: it cannot be written, and `may_fail` is not set.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        moment = self._moment
        assert moment is not None and self.dirpath is not None
        path = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        checkpoint: dict[str, Any] = {}
        self._writing = True
        try:
            failure = _failure(lambda: checkpoint.update(_checkpoint(trainer, moment)))
            # Ranks exchange their parts of the moment, so all of them or none.
            failure = failure or _failure(lambda: moment.put_into(checkpoint))
            # Not before each rank has written what goes with it, its rollouts.
            failure = failure or _failure(lambda: trainer.strategy.save_checkpoint(checkpoint, path))
        finally:
            self._writing = False
        if failure:
            why = f"{path} cannot be written ({failure})"
            if not may_fail:
                raise _NotWritten(
                    f"{why}; the checkpoint before it is whole: make room, and go on with --ckpt_path last.",
                    reported_elsewhere=collectives.rank() > 0,
                )
            rank_zero_warn(f"{why}; the checkpoint before it is whole.")
            return
        self._saved, self._steps_saved = moment, trainer.global_step
        self.best_model_path = str(path)


def _checkpoint(trainer: Trainer, moment: Snapshot) -> dict[str, Any]:
    """The checkpoint of a moment; callbacks write what goes with it."""
    checkpoint = dump_checkpoint(trainer)
    log = next((logger for logger in trainer.loggers if isinstance(logger, ResumableCSVLogger)), None)
    checkpoint["run"] = {"version": log.version if log else None, "step": moment.step}
    return checkpoint


def _failure(work: Callable[[], None]) -> str:
    """Why a piece of work failed to write, if on one rank alone; empty where it did not. Every rank has to call it."""
    reason = ""
    try:
        work()
    except OSError as error:
        reason = error.strerror or str(error)
    return max(collectives.all_gather_object(reason))


class _NotWritten(AllRanksUserError):
    """A checkpoint could not be written, so trying again while ending is in vain."""
