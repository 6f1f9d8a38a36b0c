"""Options of the optimizer and its scheduler that are applied again on resume, in place of the checkpoint's."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_PROGRESS = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial")
"""Attributes of a scheduler that change while it runs."""


def optimizer_options(optimizer: Optimizer, scheduler: LRScheduler | None) -> list[dict[str, Any]]:
    """Copies the options of an optimizer and its scheduler; call it before a checkpoint is loaded into them.

    Returns:
        The options of each parameter group, then those of the scheduler.
    """
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    return [*groups, {} if scheduler is None else _scheduler_options(scheduler)]


def apply_options(options: list[dict[str, Any]], optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    """Replaces the options that a checkpoint restored; if none differs, nothing changes.

    A scheduled learning rate keeps its ratio to the initial learning rate.

    Args:
        options: Options from `optimizer_options`.
        optimizer: Optimizer with the checkpoint's state.
        scheduler: Scheduler with the checkpoint's state; None for a constant learning rate.
    """
    *groups, scheduler_options = options
    for group, configured in zip(optimizer.param_groups, groups, strict=True):
        base = "lr" if scheduler is None else "initial_lr"
        if group[base] != configured[base]:
            group["lr"] = group["lr"] * configured[base] / group[base] if group[base] else configured[base]
        group.update({name: value for name, value in configured.items() if name != "lr"})
    if scheduler is not None:
        vars(scheduler).update(scheduler_options)


def apply_optimizer_options(module: LightningModule, options: list[dict[str, Any]]) -> None:
    """Calls `apply_options` for the module's only optimizer and its scheduler; call it in `on_train_start`."""
    optimizer, scheduler = module.optimizers(use_pl_optimizer=False), module.lr_schedulers()
    assert isinstance(optimizer, Optimizer)
    apply_options(options, optimizer, scheduler if isinstance(scheduler, LRScheduler) else None)


def _scheduler_options(scheduler: LRScheduler) -> dict[str, Any]:
    """The attributes that a scheduler's arguments set; loading its state overwrites them."""
    state = scheduler.state_dict()
    return {name: value for name, value in state.items() if name not in _PROGRESS and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    """True for None, a bool, a number, a string or a list of numbers."""
    if isinstance(value, list):
        return all(isinstance(v, (int, float)) for v in value)
    return isinstance(value, (bool, int, float, str, type(None)))
