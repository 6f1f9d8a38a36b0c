"""All uses of Lightning's internals, one small function each.

A minor release of Lightning may change them, so pyproject.toml pins Lightning to 2.6 and
tests/distributed/test_lightning_internals.py fails when the version or one of the internals is another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

LoopStates = dict[str, Any]
"""State of Lightning's loops as in a checkpoint under `loops`."""

# Trainer --------------------------------------------------------------------------------------------------------------


def cluster_environment(trainer: Trainer) -> ClusterEnvironment:
    """The cluster environment; the strategy of a single device has no public attribute for it."""
    environment: ClusterEnvironment = trainer._accelerator_connector.cluster_environment
    return environment


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """The checkpoint as a dict; `Trainer.save_checkpoint`, which is public, writes it to a file at once."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def train_batches_done(trainer: Trainer) -> int:
    """Number of train batches, over all epochs; Lightning has no public name for the step number of its loggers.

    `Trainer.global_step` counts optimizer steps instead. Lightning's LearningRateMonitor reads the same attribute.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def training_progress(trainer: Trainer) -> tuple[int, int]:
    """Number of train batches processed and of optimizer steps started.

    `Trainer.global_step` counts optimizer steps completed, so it does not show that a step is under way.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    return loop.batch_progress.total.processed, loop.manual_optimization.optim_step_progress.total.ready


def forget_step_metrics(trainer: Trainer) -> None:
    """Forgets the metrics of the last train step; call it before the next one.

    Lightning logs per step what `training_step` has ever logged, so a step without a metric would log an old value.
    """
    results: Any = trainer._results
    for item in results.values():
        if item.meta.fx == "training_step" and item.meta.on_step and not item.meta.on_epoch:
            item.reset()


def add_step_end_hook(trainer: Trainer, hook: Callable[[], None]) -> None:
    """Calls `hook` after each train step with its logging and validation; Lightning has no hook there.

    `on_train_batch_end` runs before the metrics of the step are logged and before the validation that follows it.
    """
    loop, name = trainer.fit_loop.epoch_loop, "on_advance_end"
    on_advance_end = getattr(type(loop), name).__get__(loop)  # without the hook of an earlier call of `fit`

    def on_advance_end_with_hook(data_fetcher: Any) -> None:
        on_advance_end(data_fetcher)
        hook()

    setattr(loop, name, on_advance_end_with_hook)


def is_last_step(trainer: Trainer) -> bool:
    """True if training ends after the current step; `fit_loop.done` is updated only later."""
    fit: Any = trainer.fit_loop
    epochs = fit.epoch_progress.current.processed + fit.epoch_loop.batch_progress.is_last_batch
    return bool(
        trainer.should_stop
        or -1 < trainer.max_steps <= trainer.global_step
        or (fit.max_epochs is not None and -1 < fit.max_epochs <= epochs)
    )


# States of the loops --------------------------------------------------------------------------------------------------
# Lightning saves in the middle of a step and offers no way to save at the end of one, so its loop states are edited.


def loops_after_train_batch(trainer: Trainer) -> LoopStates:
    """State of the loops; call it in `on_train_batch_end`.

    From this state Lightning resumes with the next step. It takes a validation that was due after this step as done.
    """
    return copy.deepcopy(trainer._checkpoint_connector._get_loops_state_dict())


def loops_after_step(loops: LoopStates, trainer: Trainer) -> LoopStates:
    """Edits a state to the one at the end of the step; after the last step of an epoch it lies between two epochs.

    From its own state there, Lightning resumes with epoch counts that lag, and later trains an epoch too many.

    Args:
        loops: State from `loops_after_train_batch`; it is changed in place.
        trainer: Trainer of the run.
    """
    fit = loops["fit_loop"]
    batches, epochs = fit["epoch_loop.batch_progress"], fit["epoch_progress"]
    if not batches["is_last_batch"]:
        return loops
    started = epochs["total"]["started"], epochs["current"]["started"]
    for part, count in zip(("total", "current"), started, strict=True):
        epochs[part] = dict.fromkeys(epochs[part], count)
    batches["current"] = dict.fromkeys(batches["current"], 0)
    if trainer.max_steps == -1:  # Lightning then restarts a completed epoch as a new one and corrects no count
        batches["total"]["completed"] += 1
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    else:  # Lightning counts the batch as completed when it resumes, so -1 becomes 0
        batches["current"]["completed"] = -1
    batches["is_last_batch"] = False
    fit["state_dict"].pop("combined_loader", None)
    return loops


def loops_before_validation(loops: LoopStates) -> LoopStates:
    """The state from which Lightning resumes with the validation that is due after the step.

    It is the state that Lightning has within the validation; it repeats the validation from the first batch.

    Args:
        loops: State from `loops_after_train_batch`; it is not changed.
    """
    before_validation = copy.deepcopy(loops)
    fit = before_validation["fit_loop"]
    for part in ("total", "current"):
        fit["epoch_loop.batch_progress"][part]["completed"] += 1
    for part in ("total", "current"):
        fit["epoch_loop.val_loop.batch_progress"][part] = {"ready": 1, "completed": 0, "started": 1, "processed": 0}
    fit["epoch_loop.val_loop.batch_progress"]["is_last_batch"] = False
    return before_validation


def completed_epochs(loops: LoopStates) -> int:
    """Number of completed epochs: the `epoch` of a checkpoint with these loop states."""
    return int(loops["fit_loop"]["epoch_progress"]["current"]["completed"])


# ModelParallelStrategy ------------------------------------------------------------------------------------------------


def set_data_parallel(strategy: ModelParallelStrategy) -> None:
    """Makes all devices one data-parallel group; the constructor takes the number, which is known only later."""
    strategy._data_parallel_size, strategy._tensor_parallel_size = strategy.num_nodes * strategy.num_processes, 1


def set_process_group_backend(strategy: ModelParallelStrategy, backend: str) -> None:
    """Sets the process group's backend; the constructor takes it, before the device is known."""
    strategy._process_group_backend = backend


def set_device(module: LightningModule, device: torch.device) -> None:
    """Sets what `module.device` returns without moving tensors; the public `module.to` moves all of them."""
    _update_properties(module, device=device)


def disable_inference_mode(trainer: Trainer) -> None:
    """Evaluates under `no_grad`; `Trainer(inference_mode=False)` is public, but a strategy comes after the Trainer."""
    for loop in (
        trainer.fit_loop.epoch_loop.val_loop,
        trainer.validate_loop,
        trainer.test_loop,
        trainer.predict_loop,
    ):
        loop.inference_mode = False
