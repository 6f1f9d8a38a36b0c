"""What all callbacks share: where a run's files go, which step it is, reading what a step returned, and printing."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from tqdm import tqdm

from rlmt.data import RolloutDataModule
from rlmt.distributed.lightning_internals import train_batches_done
from rlmt.errors import UserError
from rlmt.options import NonNegativeInt, check_ranges
from rlmt.types import Experience


def experience_of(outputs: Any) -> Experience:
    """The `Experience` that a step of `RLMTModule` returned.

    Raises:
        TypeError: The module's step returned something else, so the callback does not belong in its trainer.
    """
    experience = outputs.get("experience") if isinstance(outputs, Mapping) else None
    if not isinstance(experience, Experience):
        raise TypeError('rlmt callbacks require a module whose steps return {"experience": Experience}')
    return experience


def step_metrics(trainer: Trainer, outputs: Any) -> dict[str, float]:
    """The metrics that `RLMTModule` logged in the training step that returned `outputs`, reduced over ranks.

    `trainer.callback_metrics` alone would also have metrics of earlier steps, which this step did not log.
    """
    logged = trainer.callback_metrics
    return {name: float(logged[name]) for name in outputs["metrics"]}


def run_folder(trainer: Trainer) -> Path:
    """The folder of metrics.csv, or else the first logger's, or else `default_root_dir`.

    All ranks have to call it, because rank 0's answer is broadcast: so in `setup`, not when an error is handled.
    """
    csv = next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
    folder = trainer.log_dir if csv is None else trainer.strategy.broadcast(csv.log_dir)
    return Path(folder or trainer.default_root_dir)


def rollout_data(trainer: Trainer, user: str) -> RolloutDataModule:
    """The data module that generates.

    Args:
        trainer: Trainer.
        user: Name of the callback, for the message.

    Raises:
        UserError: The run's data module is another one.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, RolloutDataModule):
        raise UserError(f"{user} generates with RolloutDataModule, but --data is {type(data).__name__}; remove it.")
    return data


def is_dry_run(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`, which has no loggers and writes no files."""
    return bool(getattr(trainer, "fast_dev_run", False))


def step_number(trainer: Trainer) -> int:
    """Number of the current rollout step, from 0 over all epochs: the `step` column of metrics.csv.

    `Trainer.global_step` counts optimizer steps, of which one rollout may take several.
    """
    return train_batches_done(trainer)


def say(text: str) -> None:
    """Prints above a live progress bar: tqdm's is moved out of the way, and rich's redirects stdout by itself."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    tqdm.write(text.encode(encoding, "replace").decode(encoding), file=sys.stdout)


@contextmanager
def report_write_errors(what: str) -> Iterator[None]:
    """Prints errors of writing: a full disk must not hide why a run failed, nor keep other callbacks from saving."""
    try:
        yield
    except OSError as error:
        say(f"{what} cannot be written: {error}")


def format_of(pl_module: LightningModule) -> dict[str, Any] | None:
    """The module's thinking format as a dict, to be saved with the files; None for a module without one."""
    thinking: Any = getattr(pl_module, "format", None)
    return None if thinking is None else dict(thinking.to_dict())


class PictureCallback(Callback):
    """Base of callbacks that draw one picture of a run, from points that they collect.

    The picture is drawn every `every_n_steps` steps, at the end, and when a run is interrupted or fails; then its path
    is printed. At the end `RunSummary` names it among the files of the run.

    Args:
        every_n_steps: Steps between drawings during training; 0 draws at the end only.

    Raises:
        UserError: `every_n_steps` is negative.
    """

    file_name: str
    """Name of the picture in the run's folder."""
    title: str
    """What the picture shows, printed before its path."""

    def __init__(self, every_n_steps: NonNegativeInt = 50) -> None:
        check_ranges(type(self), locals())
        self.every_n_steps = every_n_steps
        self._folder: Path | None = None
        self._has_new_points = False

    @abstractmethod
    def draw(self, path: Path) -> Path | None:
        """Draws the points collected so far; None if there are none."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the run's folder; a `fast_dev_run` draws nothing."""
        fitting = stage == "fit" and not is_dry_run(trainer)
        self._has_new_points = False
        self._folder = run_folder(trainer) if fitting else None

    def draw_if_due(self, trainer: Trainer) -> None:
        """Draws every `every_n_steps` steps; to be called at the end of a step."""
        self._has_new_points = True
        if self.every_n_steps and (step_number(trainer) + 1) % self.every_n_steps == 0:
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the whole run."""
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draws an interrupted or failed run, and prints the picture's path; a run without a step has none."""
        if self._has_new_points and (drawn := self._draw(trainer)) is not None:
            say(f"{self.title}: {drawn}")

    def _draw(self, trainer: Trainer) -> Path | None:
        if self._folder is None or not trainer.is_global_zero:
            return None
        with report_write_errors(self.title):
            return self.draw(self._folder / self.file_name)
        return None
