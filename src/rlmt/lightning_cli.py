"""`rlmt fit | validate | test | predict`: the LightningCLI of rlmt."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger

import rlmt.algorithms
import rlmt.data
import rlmt.engines
import rlmt.modules
import rlmt.rewards  # noqa: F401 - imported so that their classes can be named without a module path
from rlmt.errors import UserError
from rlmt.parsing import Parser


class RLMTCLI(LightningCLI):
    """LightningCLI with the run folder's layout, a CSV log that is always on, and errors of one line."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One seed for everything: samples and the order of prompts follow `--seed_everything`."""
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the CSV logger and the checkpoint of the latest step, both inside `trainer.default_root_dir`."""
        config = self._get(self.config_init, "trainer")
        root = Path(config.default_root_dir or "runs/default")
        given = config.logger
        loggers: list[Logger] = given if isinstance(given, list) else [given] if isinstance(given, Logger) else []
        if not any(isinstance(logger, CSVLogger) for logger in loggers):
            loggers = [CSVLogger(root, name=None), *loggers]
        for callback in config.callbacks or []:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(root / "checkpoints")
        return super().instantiate_trainer(logger=loggers, default_root_dir=str(root), **kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Does not gather predictions in memory: a callback writes them."""
        self.trainer.predict(**{**kwargs, "return_predictions": False})


def run(args: list[str]) -> int:
    """Runs a Trainer command.

    Args:
        args: the command and its options.

    Returns:
        Exit status: 0, or 130 when interrupted.

    Raises:
        UserError: a mistake in the configuration or the data.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
    sys.argv = [sys.argv[0]]  # LightningCLI warns of arguments given twice
    RLMTCLI(
        parser_class=Parser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        args=args,
    )
    return 0


__all__ = ["RLMTCLI", "UserError", "run"]
