"""Options that are not what they were: a resumed run says so, with both values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

IGNORED = (
    "config",
    "ckpt_path",
    "weights_only",
    "data.engine.shared_folder",
    "data.engine.timeout",
    "data.engine.urls",
    "data.engine_timeout",
    "trainer.callbacks",
    "trainer.default_root_dir",
    "trainer.enable_",
    "trainer.fast_dev_run",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.max_epochs",
    "trainer.max_time",
    "trainer.plugins",
    "trainer.profiler",
)
"""Beginnings of the names of options that say how long and how visibly a run goes on, not how."""


class ConfigInCheckpoint(SaveConfigCallback):
    """Writes config.yaml beside metrics.csv, as Lightning does, and keeps the configuration in every checkpoint."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the configuration as plain data."""
        checkpoint["config"] = self.plain

    @property
    def plain(self) -> dict[str, Any]:
        """The configuration as plain data."""
        plain: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        return plain


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each option whose value differs and can alter the run.

    Args:
        before: configuration as plain data, of the run so far.
        now: of the run that goes on.
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    scheduled = any(name.startswith("model.scheduler") and value is not None for name, value in new.items())
    lines = []
    for name in sorted(old.keys() | new.keys()):
        harmless = name.startswith(IGNORED) or (name == "trainer.max_steps" and not scheduled)
        if not harmless and old.get(name) != new.get(name):
            lines.append(f"--{name} was {_shown(name, old)} and is {_shown(name, new)} from here on")
    return lines


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options by the names that they have on the command line."""
    for key, value in config.items():
        name = prefix if key in ("init_args", "class_path") else f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and (value or key == "init_args"):
            yield from _flat(value, name)
        else:
            yield name, value


def _shown(name: str, config: Mapping[str, Any]) -> str:
    return repr(config[name]) if name in config else "not given"


def optimizer_options(optimizer: Optimizer, scheduler: LRScheduler | None) -> list[dict[str, Any]]:
    """What configures an optimizer and its scheduler, to be taken before a checkpoint puts its own values there.

    Returns:
        The optimizer's groups' options, and last the scheduler's.
    """
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    return [*groups, {} if scheduler is None else _shape(scheduler)]


def apply_options(options: list[dict[str, Any]], optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    """Puts configured options in the place of a checkpoint's; without a change of any, nothing changes.

    A learning rate that a scheduler has moved stays in proportion to the one it started from.

    Args:
        options: from `schedule_options`.
        optimizer: with a checkpoint's state.
        scheduler: the same.
    """
    *groups, shape = options
    for group, wanted in zip(optimizer.param_groups, groups, strict=True):
        base = "lr" if scheduler is None else "initial_lr"
        if group[base] != wanted[base]:
            group["lr"] = group["lr"] * wanted[base] / group[base] if group[base] else wanted[base]
        group.update({name: value for name, value in wanted.items() if name != "lr"})
    if scheduler is not None:
        vars(scheduler).update(shape)


def apply_optimizer_options(module: LightningModule, options: list[dict[str, Any]]) -> None:
    """`adopt` for a module's one optimizer and its scheduler; to be called in `on_train_start`."""
    optimizer, scheduler = module.optimizers(use_pl_optimizer=False), module.lr_schedulers()
    assert isinstance(optimizer, Optimizer)
    apply_options(options, optimizer, scheduler if isinstance(scheduler, LRScheduler) else None)


def _shape(scheduler: LRScheduler) -> dict[str, Any]:
    """The attributes that a scheduler's arguments set, which its state overwrites."""
    kinds = (bool, int, float, str, list, type(None))
    course = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial")
    state = scheduler.state_dict()
    return {name: value for name, value in state.items() if name not in course and _plain(value, kinds)}


def _plain(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (not isinstance(value, list) or all(isinstance(v, (int, float)) for v in value))


def warn_about_changes(before: Mapping[str, Any] | None, now: Mapping[str, Any], where: str) -> None:
    """Warns, a line an option, of what a checkpoint's run did otherwise.

    Args:
        before: configuration in the checkpoint, None for one without.
        now: of this run.
        where: what to call the checkpoint.
    """
    for line in [] if before is None else config_changes(before, now):
        rank_zero_warn(f"{where}: {line}")
