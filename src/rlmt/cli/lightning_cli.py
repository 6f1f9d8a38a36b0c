"""`rlmt fit`, `validate`, `test` and `predict`: a LightningCLI."""

from __future__ import annotations

import os
import signal
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

import rlmt.algorithms
import rlmt.data
import rlmt.engines
import rlmt.modules
import rlmt.rewards  # noqa: F401 - importing them lets options name their classes without a module path
from rlmt.callbacks import PolicyCheckpoint, ReportWriter, RunRecord, RunState, RunSummary, StepProgressBar
from rlmt.checkpointing.config_changes import ConfigInCheckpoint, warn_about_changes
from rlmt.checkpointing.csv_logger import ResumableCSVLogger
from rlmt.checkpointing.files import AtomicCheckpointIO, read_checkpoint
from rlmt.checkpointing.last_checkpoint import CHECKPOINT, checkpoints, last_checkpoint
from rlmt.checkpointing.signals import StoppedBySignal
from rlmt.checkpointing.watchdog import TimedOut
from rlmt.cli.checks import (
    SERVICES,
    check_data,
    check_folder,
    check_manual_optimization,
    check_optimizer,
    setup_message,
    trainer_message,
)
from rlmt.cli.config_files import ConfigFiles
from rlmt.cli.lightning_habits import check_lightning_habits, with_default_classes
from rlmt.cli.parsing import Parser, option_names, parse_integers_first
from rlmt.distributed import collectives
from rlmt.errors import AllRanksUserError, UserError
from rlmt.formats.thinking import FILE_NAME, ThinkingFormat

KEYWORDS = ("last", "best", "hpc", "registry")
"""Values of `--ckpt_path` that Lightning resolves."""


def with_display(callbacks: Callback | list[Callback], bar: bool, report: bool) -> list[Callback]:
    """Adds the files of a run's state and start, its progress bar and summary, where the configuration has none.

    Args:
        callbacks: Callbacks of the configuration.
        bar: Whether progress bars are enabled.
        report: Whether the page of the run is written; otherwise its callback is left out.
    """
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    callbacks = [callback for callback in callbacks if report or not isinstance(callback, ReportWriter)]
    added: list[Callback] = []
    if bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        added.append(StepProgressBar())
    if not any(isinstance(callback, RunSummary) for callback in callbacks):
        added.append(RunSummary())
    # They come first, because the page that ReportWriter writes shows what they write.
    first = [kind() for kind in (RunState, RunRecord) if not any(isinstance(callback, kind) for callback in callbacks)]
    return [*first, *callbacks, *added]


class RLMTCLI(LightningCLI):
    """LightningCLI with the layout of a run folder, a CSV logger in every run, and one-line errors."""

    def __init__(self, *, args: Sequence[str], **options: Any) -> None:
        self._command = args[0]
        super().__init__(args=list(args), **options)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that is given: a parser of the others, which are as large, would take seconds for nothing."""
        return {self._command: super().subcommands()[self._command]}

    def setup_parser(self, *args: Any, **options: Any) -> None:
        """Creates the parser, whose help names the command as it is typed."""
        super().setup_parser(*args, **options)
        parse_integers_first(self._subcommand_parsers[self._command])
        self._subcommand_parsers[self._command].prog = f"rlmt {self._command}"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--report`, and links the data's seed to `--seed_everything`, which so determines all samples, too."""
        help_text = "Whether training writes report.html, the page of the run, beside metrics.csv."
        parser.add_argument("--report", type=bool, default=True, help=help_text)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the CSV logger, in whose `version_N` checkpoints are placed, too, and atomic checkpoint writes.

        `{format}` in that folder is replaced by the name of the thinking format, so that runs that differ only in it
        get folders of their own.
        """
        config = self._get(self.config_init, "trainer")
        if str(config.precision).startswith("16"):  # on a CPU Lightning replaces it, with a warning
            raise UserError(
                f"--trainer.precision is {config.precision}: use 32-true or bf16-mixed, since rlmt scales no losses, "
                "and small gradients would be 0 in float16."
            )
        if not self.model.automatic_optimization:
            check_manual_optimization(config)
        name = getattr(getattr(self.model, "configured_format", None), "name", "{format}")
        root = Path((config.default_root_dir or "runs/default").replace("{format}", name))
        logger = config.logger
        loggers: list[Logger] = logger if isinstance(logger, list) else [logger] if isinstance(logger, Logger) else []
        if not any(isinstance(logger, CSVLogger) for logger in loggers):
            loggers = [ResumableCSVLogger(root), *loggers]
        loggers.sort(key=lambda logger: not isinstance(logger, CSVLogger))  # checkpoints are placed by the first one
        plugins = config.plugins if isinstance(config.plugins, list) else [config.plugins] if config.plugins else []
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, AtomicCheckpointIO()]
        check_folder(root)
        overrides = {"logger": loggers, "default_root_dir": str(root), "plugins": plugins}
        bar, report = config.enable_progress_bar is not False, self._get(self.config_init, "report")
        overrides["callbacks"] = with_display(config.callbacks or [], bar, report)
        try:
            return super().instantiate_trainer(**overrides, **kwargs)
        except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as error:
            raise UserError(trainer_message(error)) from error

    def instantiate_classes(self) -> None:
        """Creates the module, its data and the Trainer, and checks that they fit.

        Raises:
            UserError: A package is missing, a logger cannot start, or an option is invalid.
        """
        try:
            super().instantiate_classes()
        except Exception as error:
            if (message := setup_message(error)) is None:
                raise
            raise UserError(message) from error
        check_data(self.model, self.datamodule)
        check_optimizer(self.model)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Merges the `--config` files and parses everything once.

        The arguments are stored in `sys.argv`, from which Lightning launches the other processes of a run.
        """
        command, *options = map(str, args)
        check_lightning_habits(options, os.environ)
        options = with_default_classes(options)
        files = ConfigFiles(options)
        files.check_names({name.lstrip("-").partition(".")[0] for name in option_names(parser, command)})
        files.check_classes()
        with files.named_in_errors():
            super().parse_arguments(parser, [command, *files.args])
        sys.argv = [sys.argv[0], command, *options]

    def _parse_ckpt_path(self) -> None:
        """Does nothing; Lightning would read the whole checkpoint for hyperparameters, which rlmt does not store."""

    def check_checkpoint(self) -> None:
        """Checks before any model is loaded that `--ckpt_path` exists and fits the run.

        Raises:
            UserError: The checkpoint does not exist, is damaged or does not fit the run.
        """
        ckpt_path = self._get(self.config_init, "ckpt_path")
        if ckpt_path == "best":
            raise UserError("--ckpt_path best: no earlier run is known; pass the path of its checkpoint.")
        path = self._last_checkpoint() if ckpt_path == "last" else ckpt_path and Path(ckpt_path)
        self._check_overwriting(resumed=ckpt_path == "last")
        if path is None:
            self.config_init[self.subcommand]["ckpt_path"] = None
            return
        if ckpt_path in KEYWORDS and ckpt_path != "last":
            return
        if not path.exists():
            raise UserError(f"--ckpt_path {ckpt_path}: {path} does not exist; pass a checkpoint of `rlmt fit`.")
        self.config_init[self.subcommand]["ckpt_path"] = str(path)
        if path.is_file() and not zipfile.is_zipfile(path):
            raise UserError(f"--ckpt_path {ckpt_path}: {path} is truncated or not a checkpoint; pass an earlier one.")
        policy_folder = path.parent / "policy"
        if (policy_folder / FILE_NAME).is_file() and hasattr(self.model, "check_format"):
            self.model.check_format(ThinkingFormat.load(policy_folder), f"--ckpt_path {ckpt_path}")
        checkpoint = read_checkpoint(path, map_location="cpu", mmap=True) if path.is_file() else None
        if checkpoint is not None and hasattr(self.model, "check_checkpoint"):
            self.model.check_checkpoint(checkpoint, self.subcommand == "fit")
        if checkpoint is not None and self.subcommand == "fit":
            self._prepare_resume(checkpoint, ckpt_path)

    def prepare(self) -> None:
        """Checks the checkpoint, and decides on options that depend on the memory of the device.

        Raises:
            UserError: The checkpoint does not fit the run, or a model's config cannot be read.
        """
        self.check_checkpoint()
        engines = (getattr(self.datamodule, name, None) for name in ("engine", "val_engine"))
        left = {option for engine in engines for option in getattr(engine, "left_to_plan", ())}
        if "quantization" in left or (left and self.trainer.strategy.root_device.type == "cuda"):
            from rlmt.memory.engine_options import choose_for_trainer  # imports the plan, which takes time

            choose_for_trainer(self.model, self.datamodule, self.trainer)

    before_fit = before_validate = before_test = before_predict = prepare

    @property
    def _plain_config(self) -> dict[str, Any]:
        """The configuration as plain data."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((callback.plain for callback in callbacks if isinstance(callback, ConfigInCheckpoint)), {})

    def _last_checkpoint(self) -> Path | None:
        """The checkpoint that `--ckpt_path last` stands for; None if a run starts without one.

        Raises:
            UserError: There is none, and the command is not `fit`. A job that a cluster requeues may pass `last` from
                its first start on.
        """
        root = Path(self.trainer.default_root_dir)
        csv = next((logger for logger in self.trainer.loggers if isinstance(logger, CSVLogger)), None)
        root = root if csv is None else Path(csv.root_dir)
        for folder in self._fixed_checkpoint_folders():
            last = folder / CHECKPOINT.name
            return last if last.exists() or self.subcommand != "fit" else None
        found = last_checkpoint(root, self._plain_config)
        if found is None and self.subcommand != "fit":
            raise UserError(f"--ckpt_path last: {root} has no checkpoint of this run; pass the path of one.")
        if found is None and (others := checkpoints(root)):
            rank_zero_info(
                f"--ckpt_path last: {root} has checkpoints of other runs only (such as {others[-1]}), which differ in "
                "the seed, the model, the objective or the format; this run starts at step 0."
            )
        return found

    def _fixed_checkpoint_folders(self) -> list[Path]:
        """Folders that the configuration sets for `last.ckpt`, instead of the one in `version_N`."""
        callbacks = self.trainer.checkpoint_callbacks
        return [Path(c.dirpath) for c in callbacks if isinstance(c, PolicyCheckpoint) and c.dirpath]

    def _check_overwriting(self, resumed: bool) -> None:
        """Raises a UserError if a new run would overwrite the checkpoint of another one."""
        for folder in self._fixed_checkpoint_folders() if self.subcommand == "fit" and not resumed else []:
            if (last := folder / CHECKPOINT.name).exists():
                raise UserError(
                    f"PolicyCheckpoint.dirpath: {last} is the checkpoint of another run, which this one would "
                    "overwrite; give another folder, or resume with --ckpt_path last."
                )

    def _prepare_resume(self, checkpoint: dict[str, Any], ckpt_path: str) -> None:
        """Warns about changed options and, with `--ckpt_path last`, resumes metrics.csv.

        A checkpoint passed by its path may be an old one that a new run branches from, so its log stays as it is.
        """
        warn_about_changes(checkpoint.get("config"), self._plain_config, f"--ckpt_path {ckpt_path}")
        run = checkpoint.get("run") or {}
        for logger in self.trainer.loggers:
            if ckpt_path == "last" and isinstance(logger, ResumableCSVLogger) and run.get("version") is not None:
                logger.resume(run["version"], run["step"])

    def validate(self, **kwargs: Any) -> None:
        """Runs validation; `RunSummary` prints the results, with intervals."""
        self.trainer.validate(**{**kwargs, "verbose": False})

    def test(self, **kwargs: Any) -> None:
        """Runs the test; `RunSummary` prints the results, with intervals."""
        self.trainer.test(**{**kwargs, "verbose": False})

    def predict(self, **kwargs: Any) -> None:
        """Runs prediction without collecting the results in memory; a callback writes them."""
        self.trainer.predict(**{**kwargs, "return_predictions": False})


def run(args: list[str], cli: type[RLMTCLI] = RLMTCLI) -> int:
    """Runs a Trainer command.

    Args:
        args: The command and its options.
        cli: Class that parses and runs it.

    Returns:
        Exit status: 0, or 128 + the signal's number if a signal ended the run.

    Raises:
        UserError: The configuration or the data is invalid.
    """
    sys.argv = [sys.argv[0]]  # LightningCLI warns when it is passed arguments and sys.argv has some, too
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
            collectives.all_gather_object(None)  # waits for the other ranks, as below
        return int(stop.code or 0)
    except SIGTERMException:
        return 128 + signal.SIGTERM
    except AllRanksUserError:
        collectives.all_gather_object(None)  # Lightning kills rank 0 if it is still busy when the others have exited
        raise
    except Exception as error:
        if type(error).__module__.startswith(SERVICES) and (message := setup_message(error)):
            raise UserError(message) from error
        raise
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        return 128 + signal.SIGINT  # Lightning exits with status 1 on Ctrl-C
    return 0
