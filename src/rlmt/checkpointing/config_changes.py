"""Options that differ between a checkpoint's run and the run that resumes from it, with a warning for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_warn

from rlmt.checkpointing.csv_logger import ResumableCSVLogger

IGNORED = (
    "config",
    "ckpt_path",
    "weights_only",
    "data.engine.shared_folder",
    "data.engine.timeout",
    "data.engine.urls",
    "data.engine.weight_transfer",
    "data.engine_timeout",
    "report",
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
"""Prefixes of options that set how long a run takes and what it shows, but not its results."""


CONFIG_FILE = "config.yaml"
"""Name of the file in a run's folder with its whole configuration."""

_IDENTITY = ("seed_everything", "model", "model.policy", "model.model", "model.algorithm")
"""Options that tell runs apart, besides those of the thinking format."""


class ConfigInCheckpoint(SaveConfigCallback):
    """Writes config.yaml beside metrics.csv, and stores the configuration in every checkpoint.

    Unlike Lightning's callback it writes after the first batch: a start that fails earlier leaves no files, and does
    not change those of the run that it resumes. Loggers other than the CSV logger receive the configuration as
    hyper-parameters, under the names of the command line.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Passes the configuration to the loggers."""
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams(dict(flatten(self.plain)))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Does nothing."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Writes config.yaml once, and keeps the run's folder."""
        if self.already_saved or trainer.fast_dev_run or trainer.sanity_checking:  # type: ignore[attr-defined]
            return
        super().setup(trainer, pl_module, str(trainer.state.fn))
        for logger in trainer.loggers:
            if isinstance(logger, ResumableCSVLogger):
                logger.keep(trained=trainer.state.fn == "fit")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """As `on_train_batch_end`."""
        self.on_train_batch_end(trainer, pl_module)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """As `on_train_batch_end`."""
        self.on_train_batch_end(trainer, pl_module)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """As `on_train_batch_end`."""
        self.on_train_batch_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the configuration as plain data."""
        checkpoint["config"] = self.plain

    @property
    def plain(self) -> dict[str, Any]:
        """The configuration as plain data."""
        plain: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        return plain


def warn_about_changes(before: Mapping[str, Any] | None, now: Mapping[str, Any], where: str) -> None:
    """Warns about each option that differs from a checkpoint's and can change the results.

    Args:
        before: Configuration in the checkpoint; None if it has none.
        now: Configuration of this run.
        where: Name of the checkpoint for the message.
    """
    for line in [] if before is None else config_changes(before, now):
        rank_zero_warn(f"{where}: {line}")


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describes each option that differs and can change the results.

    Args:
        before: Configuration of the checkpoint's run, as plain data.
        now: Configuration of the run that resumes from it.

    Returns:
        One line per option, sorted by name.
    """
    old, new = dict(flatten(before)), dict(flatten(now))
    scheduled = any(name.startswith("model.scheduler") and value is not None for name, value in new.items())
    lines = []
    for name in sorted(old.keys() | new.keys()):
        harmless = name.startswith(IGNORED) or (name == "trainer.max_steps" and not scheduled)
        if not harmless and old.get(name) != new.get(name):
            lines.append(f"--{name} was {_shown(name, old)} and is {_shown(name, new)} from here on")
    return lines


def same_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two configurations are of the same run, whose other options may have changed.

    They have the same seed, module, model, objective and thinking format.

    Args:
        before: Configuration of a run, as plain data.
        now: Configuration of another start.
    """
    return _identity(before) == _identity(now)


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that tell runs apart."""
    options = dict(flatten(config))
    return {name: options[name] for name in options if name in _IDENTITY or name.startswith("model.format")}


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options under their names on the command line.

    Args:
        config: Configuration as plain data.
        prefix: Name of the option that it is the value of.

    Yields:
        Name and value of each option; the name of a class has its class path.
    """
    for key, value in config.items():
        name = prefix if key in ("init_args", "class_path") else f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and (value or key == "init_args"):
            yield from flatten(value, name)
        else:
            yield name, value


def _shown(name: str, config: Mapping[str, Any]) -> str:
    return repr(config[name]) if name in config else "not given"
