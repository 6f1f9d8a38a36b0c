"""The small training state at the end of a step, so that a checkpoint is one of a complete step.

A step is complete when it is trained, logged and, if it is due, validated. Lightning saves in the middle of a step,
before its metrics are logged and before the validation that follows it, and a run resumed from there does neither. So
the small states of a run (loops, prompts, random states) are copied at the end of each step. The large ones, weights
and the optimizer's moments, change only with an optimizer step. Until the next one starts, they and the copies are the
run at the end of the step, and a checkpoint can be written, whatever was generated, scored or computed since.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from rlmt.distributed.collectives import all_gather_object
from rlmt.distributed.lightning_internals import LoopStates, completed_epochs, training_progress


class RankState(ABC):
    """One rank's part of a state value; the parts of all ranks are merged when a checkpoint is written."""

    @abstractmethod
    def merge_ranks(self) -> Any:
        """Merges the parts of all ranks into the value of a single process; a collective operation."""


@dataclass
class Snapshot:
    """The small states of a run at the end of a step, or between a step and its validation."""

    step: int
    """Number of the last completed step, as in metrics.csv."""
    loops: LoopStates
    """State from which Lightning's loops resume after this step."""
    data: dict[str, Any]
    """State of the data module under its key in checkpoints."""
    module: dict[str, Any]
    """The module's `resume_state()`, with the `random` states of all ranks."""
    progress: tuple[int, int]
    """Number of train batches processed and of optimizer steps started."""

    @classmethod
    def take(cls, trainer: Trainer, loops: LoopStates, step: int) -> Snapshot:
        """Copies the current state; a collective operation.

        Args:
            trainer: Trainer during `fit`.
            loops: State from which the loops resume.
            step: Number of the last completed step.
        """
        data, module = getattr(trainer, "datamodule", None), trainer.lightning_module
        states = {} if data is None else {type(data).__qualname__: data.state_dict()}
        resume_state: Any = getattr(module, "resume_state", dict)
        own: dict[str, Any] = copy.deepcopy(resume_state())
        if "random" in own:
            own["random"] = [state for rank in all_gather_object(own["random"]) for state in rank]
        return cls(step, loops, copy.deepcopy(states), own, training_progress(trainer))

    def matches_weights(self, trainer: Trainer) -> bool:
        """True if no optimizer step started since, so that weights and optimizer still belong to this snapshot."""
        return self.progress == training_progress(trainer)

    def update_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replaces the small states of a checkpoint that has the same weights; a collective operation."""
        checkpoint["loops"] = self.loops
        checkpoint["epoch"] = completed_epochs(self.loops)
        for name, state in self.data.items():
            if state:
                checkpoint[name] = {
                    key: value.merge_ranks() if isinstance(value, RankState) else value for key, value in state.items()
                }
        checkpoint.setdefault("rlmt", {}).update(self.module)
