"""Samples of a run: a few printed, all of them saved as parquet."""

from __future__ import annotations

import io
import shutil
import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlmt.engines.rollout_files import rollout_table
from rlmt.options import IntFromTwenty, NonNegativeInt, PositiveInt, check_ranges
from rlmt.types import Experience, Split, Status

from ._common import (
    experience_of,
    format_of,
    is_dry_run,
    report_write_errors,
    run_folder,
    say,
    step_number,
)
from ._logged_samples import SampleRow, log_samples
from ._rollout_folder import RolloutFolder

_CONTROLS = {c: 0x2400 + c for c in range(0x20) if c not in (0x09, 0x0A)} | dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)
"""Control characters → visible ones: a policy may sample an escape sequence, which a terminal would execute."""


class SampleTable(Callback):
    """Prints and logs a few samples every N steps, and saves all rollouts of training as parquet.

    The printed samples are evenly spaced over the sorted rewards of the batch, from the worst to the best. TensorBoard
    and Weights & Biases receive them as a table named `samples`, if their loggers are configured.

    All rollouts go to `rollouts/` beside metrics.csv, one file for `dump_every_n_steps` steps, named by the first and
    the last step in it; see `rlmt.engines.rollout_files` for the columns. Rollouts not yet on disk are written when
    training ends or fails and before every checkpoint, so a killed and resumed run has them all. A run that resumes
    from a checkpoint drops the rows of later steps. Those of a validation go to a file of `val_rollouts/`: its prompts
    are the same each time, which shows how the thoughts on one prompt change.

    Args:
        every_n_steps: Steps between prints, from the first step on; 0 prints and logs nothing.
        num_samples: Number of samples to print and log.
        max_chars: Longest prompt, thought and response to show; the middle of longer ones is omitted.
        dump_every_n_steps: Steps per file; 0 writes no files.

    Raises:
        UserError: An argument is out of its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import SampleTable
        >>> samples = SampleTable(every_n_steps=50, num_samples=2)
        >>> trainer = Trainer(callbacks=[samples], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        every_n_steps: NonNegativeInt = 10,
        num_samples: PositiveInt = 3,
        max_chars: IntFromTwenty = 400,
        dump_every_n_steps: NonNegativeInt = 10,
    ) -> None:
        check_ranges(SampleTable, locals())
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.max_chars = max_chars
        self.dump_every_n_steps = dump_every_n_steps
        self._training: RolloutFolder | None = None
        self._validation: RolloutFolder | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the run's folder; a `fast_dev_run` leaves no files behind."""
        dumping = stage in ("fit", "validate") and self.dump_every_n_steps > 0 and not is_dry_run(trainer)
        self._training = self._validation = None
        if dumping:
            folder, rank = run_folder(trainer), f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
            self._training = RolloutFolder(folder / "rollouts", rank)
            self._validation = RolloutFolder(folder / "val_rollouts", rank)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes rollouts of steps that a resumed run repeats."""
        for folder in (self._training, self._validation):
            if folder is not None and trainer.ckpt_path:
                folder.remove_after(step_number(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collects the step's rollouts, and prints some of them if it is due."""
        experience, step = experience_of(outputs), step_number(trainer)
        if self._training is not None:
            self._training.add(rollout_table(experience, step, format_of(pl_module), trainer.global_rank))
            if (step + 1) % self.dump_every_n_steps == 0:
                with report_write_errors("rollouts"):  # on a full disk they are written later
                    self._training.flush()
        if self.every_n_steps and step % self.every_n_steps == 0 and trainer.is_global_zero:
            width, colour = shutil.get_terminal_size((120, 24)).columns, sys.stdout.isatty()
            say(render_samples(experience, step, self.num_samples, self.max_chars, width, colour))
            log_samples(trainer.loggers, choose_samples(experience, self.num_samples, self.max_chars), step)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collects the rollouts of a validation."""
        if self._validation is not None and not trainer.sanity_checking:
            experience, step = experience_of(outputs), step_number(trainer)
            self._validation.add(rollout_table(experience, step, format_of(pl_module), trainer.global_rank))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the rollouts of the validation."""
        if self._validation is not None:
            with report_write_errors("rollouts"):
                self._validation.flush()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writes the pending rollouts: a run resumed from this checkpoint does not generate them again."""
        self._flush()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the pending rollouts."""
        self._flush()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the pending rollouts."""
        with report_write_errors("rollouts"):
            self._flush()

    def _flush(self) -> None:
        if self._training is not None:
            self._training.flush()


def choose_samples(experience: Experience, num_samples: int, max_chars: int) -> list[SampleRow]:
    """Some samples of a batch, evenly spaced from the lowest to the highest reward.

    Args:
        experience: B samples after scoring.
        num_samples: Number of samples.
        max_chars: Longest prompt, thought or response.
    """
    rewards = experience.scores.total.detach().float()
    order = rewards.argsort(stable=True).tolist()
    count = min(num_samples, len(order))
    rows = []
    for i in (order[round(k * (len(order) - 1) / max(1, count - 1))] for k in range(count)):
        split = experience.splits[i]
        messages = experience.rollouts.prompts[i // experience.rollouts.group_size].messages
        texts = (messages[-1]["content"], *shown_parts(split, experience.texts[i]))
        prompt, thought, response = (shorten(text, max_chars) for text in texts)
        rows.append(SampleRow(float(rewards[i]), split.status.value, prompt, thought, response))
    return rows


def render_samples(
    experience: Experience, step: int, num_samples: int, max_chars: int, width: int, colour: bool
) -> str:
    """Renders a table of some samples of a batch, from the lowest to the highest reward, thoughts dimmed.

    Args:
        experience: B samples after scoring.
        step: Rollout step, for the title.
        num_samples: Number of samples.
        max_chars: Longest prompt, thought or response.
        width: Width of the terminal in columns.
        colour: Whether to style the text with escape sequences.

    Returns:
        The table as text.
    """
    rows = choose_samples(experience, num_samples, max_chars)
    title = f"step {step}: {len(rows)} of {len(experience.splits)} samples"
    table = Table(title=title, title_justify="left", expand=True, show_lines=True)
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("prompt", ratio=2)
    table.add_column("thought", ratio=3, style="dim")
    table.add_column("response", ratio=3)
    for row in rows:
        status = Text(row.status, style="green" if row.status == Status.OK else "red")
        table.add_row(Text(f"{row.reward:.3f}"), status, *map(Text, (row.prompt, row.thought, row.response)))
    out = io.StringIO()
    Console(file=out, force_terminal=colour, width=width, legacy_windows=False).print(table)
    return out.getvalue().rstrip("\n")


def shown_parts(split: Split, text: str) -> tuple[str, str]:
    """Thought and response to show; of a malformed completion, the text that follows the thought.

    Args:
        split: Split of the completion.
        text: The completion with its tags.
    """
    if split.ok:
        return split.thought, split.response
    if split.status is Status.UNCLOSED:
        return split.thought or text, ""
    return split.thought, text.partition(split.thought)[2] if split.thought else text


def shorten(text: str, max_chars: int) -> str:
    """Omits the middle of a text that is too long, and makes control characters visible."""
    text = text.strip().translate(_CONTROLS)
    if len(text) <= max_chars:
        return text
    head = (max_chars - 3) * 2 // 3
    return f"{text[:head]} … {text[len(text) - (max_chars - 3 - head) :]}"
