"""The moment that a checkpoint is of: the end of a step, trained, logged and, where it was due, validated.

Lightning saves in the middle of a step, before its metrics are logged and before the validation that follows it, and a
run resumed from there does neither. So the small states of a run (where the loops, the prompts and the random numbers
stand) are kept as they were at the end of the last step. The large ones, weights and moments of the optimizer, change
with an optimizer step alone: until the next one begins, they and the kept ones are the run at that moment, and it can
be saved from, whatever has been drawn, scored or computed since.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from rlmt.distributed.collectives import all_gather_object

Loops = dict[str, Any]


class RankState(ABC):
    """A rank's part of something in a state; it is put together with the others' once a checkpoint is written."""

    @abstractmethod
    def of_all_ranks(self) -> Any:
        """The whole, as one process has it; every rank has to ask for it."""


@dataclass
class Snapshot:
    """The small states of a run at the end of a step, or between a step and its validation."""

    step: int
    """Number of the last step done, as in metrics.csv."""
    loops: Loops
    """State of Lightning's loops that makes them go on behind this moment."""
    data: dict[str, Any]
    """State of the data module, by its name in checkpoints."""
    module: dict[str, Any]
    """What the module's `resume_state` gives, its `random` of all ranks."""
    progress: tuple[int, int]
    """Steps trained and optimizer steps begun."""

    @classmethod
    def of(cls, trainer: Trainer, loops: Loops, step: int) -> Snapshot:
        """The present moment; every rank has to ask for it.

        Args:
            trainer: in training.
            loops: the state that the loops are to go on from.
            step: number of the last step done.
        """
        data, module = getattr(trainer, "datamodule", None), trainer.lightning_module
        states = {} if data is None else {type(data).__qualname__: data.state_dict()}
        resume_state: Any = getattr(module, "resume_state", dict)
        own: dict[str, Any] = copy.deepcopy(resume_state())
        if "random" in own:
            own["random"] = [state for rank in all_gather_object(own["random"]) for state in rank]
        return cls(step, loops, copy.deepcopy(states), own, _progress(trainer))

    def is_now(self, trainer: Trainer) -> bool:
        """Whether weights and optimizer are still those of this moment."""
        return self.progress == _progress(trainer)

    def put_into(self, checkpoint: dict[str, Any]) -> None:
        """Makes a checkpoint that was taken later, but with the same weights, one of this moment, on every rank."""
        checkpoint["loops"] = self.loops
        checkpoint["epoch"] = self.loops["fit_loop"]["epoch_progress"]["current"]["completed"]
        for name, state in self.data.items():
            if state:
                checkpoint[name] = {
                    key: value.of_all_ranks() if isinstance(value, RankState) else value for key, value in state.items()
                }
        checkpoint.setdefault("rlmt", {}).update(self.module)


def loops_after_train_batch(trainer: Trainer) -> Loops:
    """Where the loops stand, to be called in `on_train_batch_end`.

    Lightning goes on from this state with the next step; a validation that was due after this one it takes for done.
    """
    return copy.deepcopy(trainer._checkpoint_connector._get_loops_state_dict())


def loops_after_step(loops: Loops, trainer: Trainer) -> Loops:
    """The same at the end of the step: behind the last one of an epoch it is the state between two epochs.

    From its own state there, Lightning goes on with counts of epochs that lag, and later trains an epoch too many.

    Args:
        loops: from `loops_after_training`.
        trainer: of the run.
    """
    fit = loops["fit_loop"]
    batches, epochs = fit["epoch_loop.batch_progress"], fit["epoch_progress"]
    if not batches["is_last_batch"]:
        return loops
    done = epochs["total"]["started"], epochs["current"]["started"]
    for part, count in zip(("total", "current"), done, strict=True):
        epochs[part] = dict.fromkeys(epochs[part], count)
    batches["current"] = dict.fromkeys(batches["current"], 0)
    if trainer.max_steps == -1:  # then it takes up an epoch that is over as one to start anew, and corrects no count
        batches["total"]["completed"] += 1
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    else:  # it counts the batch as completed when it goes on, so one less than none is none
        batches["current"]["completed"] = -1
    batches["is_last_batch"] = False
    fit["state_dict"].pop("combined_loader", None)
    return loops


def loops_before_validation(loops: Loops) -> Loops:
    """The state from which Lightning goes on with the validation that is due after the step.

    It is the one that it would have within the validation, whose batches it would do again from the first on.
    """
    owing = copy.deepcopy(loops)
    fit = owing["fit_loop"]
    for part in ("total", "current"):
        fit["epoch_loop.batch_progress"][part]["completed"] += 1
    for part in ("total", "current"):
        fit["epoch_loop.val_loop.batch_progress"][part] = {"ready": 1, "completed": 0, "started": 1, "processed": 0}
    fit["epoch_loop.val_loop.batch_progress"]["is_last_batch"] = False
    return owing


def is_last_step(trainer: Trainer) -> bool:
    """Whether the run is done with the step that ends now, so that there is nothing to go on with."""
    fit: Any = trainer.fit_loop
    epochs = fit.epoch_progress.current.processed + fit.epoch_loop.batch_progress.is_last_batch
    return bool(
        trainer.should_stop
        or -1 < trainer.max_steps <= trainer.global_step
        or (fit.max_epochs is not None and -1 < fit.max_epochs <= epochs)
    )


def _progress(trainer: Trainer) -> tuple[int, int]:
    loop: Any = trainer.fit_loop.epoch_loop
    return loop.batch_progress.total.processed, loop.manual_optimization.optim_step_progress.total.ready
