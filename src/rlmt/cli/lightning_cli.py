"""`rlmt fit | validate | test | predict`: the LightningCLI of rlmt."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

import rlmt.algorithms
import rlmt.data
import rlmt.engines
import rlmt.modules
import rlmt.rewards  # noqa: F401 - imported so that their classes can be named without a module path
from rlmt.checkpointing.config_changes import ConfigInCheckpoint, warn_about_changes
from rlmt.checkpointing.csv_logger import ResumableCSVLogger
from rlmt.checkpointing.files import AtomicCheckpointIO, read_checkpoint
from rlmt.checkpointing.signals import StoppedBySignal
from rlmt.checkpointing.watchdog import TimedOut
from rlmt.cli.parsing import Parser
from rlmt.distributed import collectives
from rlmt.errors import AllRanksUserError, UserError
from rlmt.formats.thinking import FILE_NAME, ThinkingFormat

KEYWORDS = ("last", "best", "hpc", "registry")
"""Values of `--ckpt_path` that Lightning resolves itself."""

QUIET = (
    ".*does not have many workers.*",  # loaders yield text; rollouts are drawn elsewhere
    ".*module\\(s\\) in eval mode at the start of training.*",  # the reference and the reward, on purpose
    ".*Checkpoint directory .* exists and is not empty.*",  # resuming is the ordinary case
    ".*set_vital.*",
    ".*torch.distributed.reduce_op.*",
    ".*torch.distributed.nn.functional.all_gather is deprecated.*",
    ".*treespec.*",
    ".*sync_dist=True.*when logging on epoch level.*",  # vLLM's process group of one is no distributed run
    "Total length of `list` across ranks is zero.*",  # no validation prompts, as asked for
    "Using ModelCheckpoint with manual optimization.*",  # the state after the optimizer's step is the one wanted
)
"""Warnings of libraries about things that are as they should be."""


def check_manual(config: Any) -> None:
    """Checks the trainer's options for a module that takes its optimizer steps itself; Lightning raises its own error.

    Args:
        config: options of the trainer.

    Raises:
        UserError: one of them is about optimizer steps.
    """
    if config.accumulate_grad_batches not in (None, 1):
        raise UserError(
            f"--trainer.accumulate_grad_batches is {config.accumulate_grad_batches}: each batch is a whole step, in "
            "micro-batches of --model.tokens_per_micro_batch; set --data.batch_size to the rows of a step instead."
        )
    if config.gradient_clip_val:
        raise UserError(
            f"--trainer.gradient_clip_val is {config.gradient_clip_val}: set --model.max_grad_norm instead."
        )


class RLMTCLI(LightningCLI):
    """LightningCLI with the run folder's layout, a CSV log that is always on, and errors of one line."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One seed for everything: samples and the order of prompts follow `--seed_everything`."""
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the CSV logger, puts checkpoints inside `trainer.default_root_dir`, and has them written whole.

        `{format}` in that folder stands for the format's name, so that runs that differ in it alone lie apart.
        """
        config = self._get(self.config_init, "trainer")
        if not self.model.automatic_optimization:
            check_manual(config)
        name = getattr(getattr(self.model, "format", None), "name", "{format}")
        root = Path((config.default_root_dir or "runs/default").replace("{format}", name))
        given = config.logger
        loggers: list[Logger] = given if isinstance(given, list) else [given] if isinstance(given, Logger) else []
        if not any(isinstance(logger, CSVLogger) for logger in loggers):
            loggers = [ResumableCSVLogger(root), *loggers]
        for callback in config.callbacks or []:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(root / "checkpoints")
        plugins = config.plugins if isinstance(config.plugins, list) else [config.plugins] if config.plugins else []
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, AtomicCheckpointIO()]
        own = {"logger": loggers, "default_root_dir": str(root), "plugins": plugins}
        return super().instantiate_trainer(**own, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Keeps the arguments where Lightning looks for them when it starts the other processes of a run."""
        super().parse_arguments(parser, args)
        sys.argv = [sys.argv[0], *map(str, args)]

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would read all of the checkpoint for hyper-parameters, which rlmt keeps in none."""

    def check_checkpoint(self) -> None:
        """Refuses a checkpoint that is not there or does not fit the run, before any model is loaded.

        Raises:
            UserError: `--ckpt_path` is such a one.
        """
        given = self._get(self.config_init, "ckpt_path")
        if given is None:
            return
        checkpoint = self._last_checkpoint() if given == "last" else Path(given)
        # A training job that is queued again and again may say `last` from its first start.
        optional = given in KEYWORDS and (given != "last" or self.subcommand == "fit")
        if not checkpoint.exists() and not optional:
            raise UserError(f"--ckpt_path {given}: there is no {checkpoint}; give a .ckpt written by `rlmt fit`.")
        if checkpoint.is_file() and not zipfile.is_zipfile(checkpoint):
            raise UserError(f"--ckpt_path {given}: {checkpoint} is torn or no checkpoint; give an earlier one.")
        saved = checkpoint.parent / "policy"
        if (saved / FILE_NAME).is_file() and hasattr(self.model, "check_format"):
            self.model.check_format(ThinkingFormat.load(saved), f"--ckpt_path {given}")
        held = read_checkpoint(checkpoint, map_location="cpu", mmap=True) if checkpoint.is_file() else None
        if held is not None and "rlmt" in held and hasattr(self.model, "check_checkpoint"):
            self.model.check_checkpoint(held, self.subcommand == "fit")
        if held is not None and self.subcommand == "fit":
            self._go_on(held, given)

    before_fit = before_validate = before_test = before_predict = check_checkpoint

    def _last_checkpoint(self) -> Path:
        """Where `last.ckpt` is, if there is one."""
        folders = (getattr(callback, "dirpath", None) for callback in self.trainer.checkpoint_callbacks)
        return Path(next(filter(None, folders), Path(self.trainer.default_root_dir, "checkpoints")), "last.ckpt")

    def _go_on(self, checkpoint: dict[str, Any], given: str) -> None:
        """Says which options are new, and with `--ckpt_path last` goes on with the same metrics.csv.

        A checkpoint that is named by its path may be an old one to branch from, so its log is left alone.
        """
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        keeper = next((c for c in callbacks if isinstance(c, ConfigInCheckpoint)), None)
        if keeper is not None:
            warn_about_changes(checkpoint.get("config"), keeper.plain, f"--ckpt_path {given}")
        run = checkpoint.get("run") or {}
        for logger in self.trainer.loggers:
            if given == "last" and isinstance(logger, ResumableCSVLogger) and run.get("version") is not None:
                logger.go_on(run["version"], run["step"])

    def predict(self, **kwargs: Any) -> None:
        """Does not gather predictions in memory: a callback writes them."""
        self.trainer.predict(**{**kwargs, "return_predictions": False})


def run(args: list[str], cli: type[RLMTCLI] = RLMTCLI) -> int:
    """Runs a Trainer command.

    Args:
        args: the command and its options.
        cli: what runs it.

    Returns:
        Exit status: 0, or 128 + the signal's number where one ended the run.

    Raises:
        UserError: a mistake in the configuration or the data.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "litlogger" not in record.getMessage())
    sys.argv = [sys.argv[0]]  # LightningCLI warns of arguments given twice
    try:
        cli(
            parser_class=Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=ConfigInCheckpoint,
            save_config_kwargs={"overwrite": True},
            args=args,
        )
    except (StoppedBySignal, TimedOut) as stop:
        if isinstance(stop, StoppedBySignal) and stop.shared:
            collectives.all_gather_object(None)  # as below
        return int(stop.code or 0)
    except SIGTERMException:
        return 128 + signal.SIGTERM
    except AllRanksUserError:
        collectives.all_gather_object(None)  # Lightning kills a first rank that is still busy when others have left
        raise
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        return 128 + signal.SIGINT  # Lightning makes a 1 of it
    return 0
