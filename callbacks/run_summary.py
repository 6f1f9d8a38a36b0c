"""What a run came to: a few lines at its end, and the table that `rlmt validate` and `rlmt test` print."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table

from rlmt.distributed.collectives import all_gather_object
from rlmt.report.run_states import REPORTED

from ._common import is_dry_run, run_folder, say
from .progress_bar import duration, significant, training_position

_TOKENS = ("thought", "response")
_FILES = ("metrics.csv", "curves.png", "cot_length.png", "calibration.png", "report.html", "rollouts")
"""Files and folders of a run that the last lines name."""

Point = tuple[int, float, float | None]
"""Step, mean, and half of the 95 % interval if there is one."""


class RunSummary(Callback):
    """Prints how reward and thought length changed over a run, where its files are, and the command to type next.

    The figures are those of the first and the last validation, with 95 % intervals over the held-out samples; without
    validation those of the first and the last training step. After `rlmt validate` and `rlmt test` it prints every
    metric, rounded, with its interval.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import RunSummary
        >>> trainer = Trainer(callbacks=[RunSummary()], logger=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        self._points: dict[str, list[Point]] = {}
        self._values: dict[str, list[Any]] = {}
        self._began, self._first_step = monotonic(), 0
        self._lines: list[str] = []
        self._folder: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        """The first and the latest value of each metric."""
        return {"points": {name: [list(point) for point in points] for name, points in self._points.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the values up to the checkpoint."""
        saved = state_dict["points"].items()
        self._points = {name: [(point[0], point[1], point[2]) for point in points] for name, points in saved}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the run's folder."""
        self._folder = None if is_dry_run(trainer) else run_folder(trainer)

    # Held-out data ----------------------------------------------------------------------------------------------------

    def _collect(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any) -> None:
        """Collects the values of each held-out sample, or its sum and its weight in the mean, for intervals."""
        values = outputs.get("values", {}) if isinstance(outputs, Mapping) else {}
        for name, of_samples in values.items():
            self._values.setdefault(name, []).extend(of_samples.tolist())

    on_validation_batch_end = on_test_batch_end = _collect

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the means of a validation within training, and prints those of one of its own."""
        intervals = self._intervals("val")
        if trainer.sanity_checking:
            return
        if trainer.state.fn != "fit":
            self._print_table(trainer, "val", intervals)
            return
        step = int(training_position(trainer)[0])
        for name, (held_out, *_) in REPORTED.items():
            if held_out in trainer.callback_metrics:
                self._add(f"val {name}", step, trainer.callback_metrics[held_out], intervals.get(held_out))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the means."""
        self._print_table(trainer, "test", self._intervals("test"))

    def _intervals(self, stage: str) -> dict[str, float]:
        """Logged name → half of the 95 % interval of its mean over the held-out samples of all ranks."""
        from rlmt.report.estimates import Estimate  # imports scipy, which takes half a second

        half: dict[str, float] = {}
        collected = all_gather_object(self._values)
        for name in dict.fromkeys(name for of_rank in collected for name in of_rank):
            values = [value for of_rank in collected for value in of_rank.get(name, [])]
            weighted = bool(values) and isinstance(values[0], list)
            estimate = Estimate.of_ratio(*zip(*values, strict=True)) if weighted else Estimate(tuple(values))
            if estimate.interval is not None:
                half[f"{stage}/{name}"] = estimate.interval[1] - estimate.mean
        self._values = {}
        return half

    def _print_table(self, trainer: Trainer, stage: str, intervals: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        logged = {name: value for name, value in trainer.callback_metrics.items() if name.startswith(f"{stage}/")}
        table = Table("metric", "value", box=None, pad_edge=False)
        table.columns[1].justify = "right"
        if intervals:
            table.add_column("± (95 % interval)")
        for name, value in logged.items():
            half = [f"± {significant(intervals[name])}"] if name in intervals else []
            table.add_row(name, significant(float(value)), *half)
        Console(highlight=False, markup=False).print(table)  # names of rewards are the user's

    # Training ---------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._began, self._first_step = monotonic(), training_position(trainer)[0]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the metrics of the step."""
        step = int(training_position(trainer)[0])
        for name, (_, *training) in REPORTED.items():
            for metric in training:
                if metric in trainer.callback_metrics:
                    self._add(name, step, trainer.callback_metrics[metric], None)

    def _add(self, name: str, step: int, value: Any, half: float | None) -> None:
        """Adds a point: the first one stays, the latest replaces the one before it."""
        self._points[name] = [*self._points.get(name, [])[:1], (step, float(value), half)]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints the lines, after the progress bar is gone and the last checkpoint is written."""
        if stage == "fit" and trainer.is_global_zero and not trainer.interrupted:
            lines = self.lines(trainer, pl_module)
            # In a log file a line stays a line, which can be searched.
            say("\n".join(wrapped(lines, shutil.get_terminal_size().columns) if sys.stdout.isatty() else lines))

    def lines(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Steps; reward or loss; lengths; files; the next command."""
        done, total = training_position(trainer)
        of = "" if total == float("inf") else f" of {total:g}"
        since = f" since step {self._first_step}" if self._first_step else ""
        lines = [f"steps     {done:g}{of}, in {duration(monotonic() - self._began)}{since}"]
        for name in REPORTED:
            points = self._points.get(f"val {name}") or self._points.get(name)
            if points and any(value for _, value, _ in points):  # no thoughts without thinking
                where = "validation" if f"val {name}" in self._points else "training"
                unit = " tokens" if name in _TOKENS else ""
                lines.append(f"{name:<9} {_change(points)}{unit} ({where})")
        checkpoint = _checkpoint(trainer)
        if self._folder is not None:
            found = [name for name in _FILES if (self._folder / name).exists()]
            lines.append(f"files     {self._folder}: {', '.join(found)}")
        if checkpoint:
            lines.append(f"next      rlmt {_next_command(pl_module, checkpoint)}")
        return lines


def wrapped(lines: list[str], width: int) -> list[str]:
    """Lines of at most `width` columns, indented below the name; the next command stays on its line, to be copied."""
    indent = " " * len("response  ")
    wrapper = textwrap.TextWrapper(width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [row for line in lines for row in ([line] if line.startswith("next") else wrapper.wrap(line))]


def _change(points: list[Point]) -> str:
    """`1.29 ± 0.61 at step 5 → 7.58 ± 0.40 at step 20`."""
    texts = [
        f"{significant(mean)}{f' ± {significant(half)}' if half else ''} at step {step}" for step, mean, half in points
    ]
    return " → ".join(texts)


def _checkpoint(trainer: Trainer) -> str:
    """Path of the newest checkpoint; "" without one."""
    paths = [c.best_model_path for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return next(filter(None, reversed(paths)), "")


def _next_command(pl_module: LightningModule, checkpoint: str) -> str:
    """Chat with a policy; a warm start and a reward model are exported for the runs that use them."""
    if getattr(pl_module, "kind", None) == "RLMTModule":
        return f"chat {checkpoint}"
    return f"export {checkpoint} {Path(checkpoint).parents[1] / 'exported'}"
