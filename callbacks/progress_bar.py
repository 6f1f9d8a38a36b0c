"""Where a run is: the step, the time left, and what happens within the step, in two rows."""

from __future__ import annotations

import logging
import math
import sys
from collections import deque
from collections.abc import Mapping
from time import monotonic
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

from rlmt import progress
from rlmt.distributed.lightning_internals import training_progress

_WINDOW = 20
"""Number of latest steps over which the time of a step is averaged."""
_LINE_EVERY = 30.0
"""Seconds between two lines where the output is not a terminal."""


class StepProgressBar(ProgressBar):
    """Shows the step and the time left, and below the phase of the step and the metrics that are logged to the bar.

    The count is that of optimizer steps where `max_steps` ends the run, so a skipped batch does not advance it; else
    that of batches. On a terminal two rows are kept up to date. Elsewhere, as in a log file, a line is printed at the
    first step, at the last one and every half minute.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import StepProgressBar
        >>> trainer = Trainer(callbacks=[StepProgressBar()], logger=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._live: Live | None = None
        self._redirected: list[tuple[Any, TextIO]] = []
        self._unit = "step"
        self._loop = ""
        self._phase: tuple[str, int, int | None] = ("", 0, None)
        self._phase_began = self._line_printed = -math.inf
        self._times: deque[tuple[int, float]] = deque(maxlen=_WINDOW + 1)
        self._done, self._total, self._skipped = 0, math.inf, 0
        self._metrics: Mapping[str, Any] = {}

    def disable(self) -> None:
        """Shows nothing from now on; Lightning calls it on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Shows the bar again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar."""
        print(*args, **kwargs)

    # Training ---------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the bar at the step from which the run starts or resumes."""
        self._done, self._total = training_position(trainer)
        self._times.clear()
        self._skipped = 0
        self._start("step")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins a step."""
        self._listen("starting", 0, None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the step."""
        self._done, self._total = training_position(trainer)
        self._times.append((self._done, monotonic()))
        metrics = outputs.get("metrics", {}) if isinstance(outputs, Mapping) else {}
        self._skipped += metrics.get("policy/skipped") == 1.0
        self._metrics = trainer.progress_bar_metrics
        self._listen("logging", 0, None)
        self._print_line(last=self._done >= self._total)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the bar."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes the bar."""
        self._stop()

    # Validation, test, prediction -------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the batches of a validation of its own; within training the bar stays that of the training."""
        if trainer.state.fn != "fit":
            self._start_batches("validation batch", sum(_per_loader(trainer.num_val_batches)))
        else:
            self._loop = "validation · "

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the validation."""
        self._loop = ""
        if trainer.state.fn != "fit":
            self._stop()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the batches of the test."""
        self._start_batches("test batch", sum(_per_loader(trainer.num_test_batches)))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the bar."""
        self._stop()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the batches of the prediction."""
        self._start_batches("batch", sum(_per_loader(trainer.num_predict_batches)))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the bar."""
        self._stop()

    def _count_batch(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Counts a batch of a validation, test or prediction of its own."""
        if trainer.state.fn == "fit":
            return
        self._done += 1
        self._times.append((self._done, monotonic()))
        self._print_line(last=self._done >= self._total)

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _count_batch

    def _start_batches(self, unit: str, total: float) -> None:
        self._done, self._total, self._metrics, self._skipped = 0, total, {}, 0
        self._times.clear()
        self._start(unit)

    # Display ----------------------------------------------------------------------------------------------------------

    def _start(self, unit: str) -> None:
        """Starts to listen and, on a terminal, to draw."""
        self._unit = unit
        self._phase, self._phase_began = ("starting", 0, None), monotonic()
        if not self._enabled:
            return
        progress.listen(self._listen)
        console = Console() if sys.stdout.isatty() else Console(stderr=True)
        if console.is_terminal:
            # The refreshing thread counts the seconds of a phase that reports nothing, such as the start of vLLM.
            self._live = Live(
                self,
                console=console,
                refresh_per_second=4,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()
            self._redirected = _redirect_logging()

    def _stop(self) -> None:
        progress.ignore(self._listen)
        if self._live is not None:
            self._live.stop()
            self._live = None
            for handler, stream in self._redirected:
                handler.setStream(stream)

    def _listen(self, phase: str, done: int, total: int | None) -> None:
        if phase != self._phase[0]:
            self._phase_began = monotonic()
        self._phase = (phase, done, total)

    def _print_line(self, last: bool) -> None:
        """Prints the state as a line where the output is not a terminal, if one is due."""
        if not self._enabled or self._live is not None:
            return
        if last or monotonic() - self._line_printed >= _LINE_EVERY:
            self._line_printed = monotonic()
            print(" · ".join(filter(None, [*self._position(), self._described_metrics()])), file=sys.stderr, flush=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The two rows: position, bar and time left; phase and metrics."""
        position, *times = self._position()
        first = Table.grid(padding=(0, 1), expand=True)
        first.add_column(no_wrap=True)
        first.add_column(ratio=1)
        first.add_column(no_wrap=True)
        total = None if math.isinf(self._total) else max(self._total, 1)
        bar = Bar(total=total or 1, completed=min(self._done, total or 1) if total else 0)
        first.add_row(position, bar, " · ".join(times))
        yield first
        parts = [self._loop + self._described_phase(), self._described_metrics()]
        yield Text(" · ".join(filter(None, parts)), no_wrap=True, overflow="ellipsis", style="dim")

    def _position(self) -> list[str]:
        """Step k of n, skipped batches, time of a step, time left."""
        parts = [f"{self._unit} {self._done}" + ("" if math.isinf(self._total) else f" of {self._total:g}")]
        if self._skipped:
            parts.append(f"{self._skipped} skipped")
        # From the end of the first step on, since that one includes the start of the engine.
        if self._times and self._times[-1][0] > self._times[0][0]:
            (first, began), (last, ended) = self._times[0], self._times[-1]
            seconds = (ended - began) / (last - first)
            parts.append(f"{duration(seconds)}/{self._unit.rpartition(' ')[2]}")
            if not math.isinf(self._total) and last < self._total:
                parts.append(f"{duration(seconds * (self._total - last))} left")
        return parts

    def _described_phase(self) -> str:
        phase, done, total = self._phase
        return f"{phase} {done} of {total}" if total else f"{phase} {duration(monotonic() - self._phase_began)}"

    def _described_metrics(self) -> str:
        values = {name: value for name, value in self._metrics.items() if name != "v_num"}
        return "  ".join(f"{name} {significant(float(value))}" for name, value in values.items())


def training_position(trainer: Trainer) -> tuple[int, float]:
    """Steps done and their total; infinite if neither `max_steps` nor `max_epochs` ends the run.

    Of the two limits it is the one that the run reaches first.
    """
    batches, positions = training_progress(trainer)[0], list[tuple[int, float]]()
    if trainer.max_steps > 0:
        positions.append((trainer.global_step, trainer.max_steps))
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and not math.isinf(trainer.num_training_batches):
        positions.append((batches, trainer.max_epochs * trainer.num_training_batches))
    if not positions:
        return batches, math.inf
    return min(positions, key=lambda position: position[1] - position[0])


def _per_loader(batches: Any) -> list[float]:
    """Number of batches of each data loader."""
    return list(batches) if isinstance(batches, list) else [batches]


def significant(value: float) -> str:
    """A number with three significant digits and no exponent where it is readable without one."""
    if value != 0 and (abs(value) < 1e-4 or not math.isfinite(value)):
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time for people: `850 ms`, `8.1 s`, `2:10 min`, `3:05 h`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d} h"


def _redirect_logging() -> list[tuple[Any, TextIO]]:
    """Lets the handlers of logging write above a live display, and returns each with its stream, to restore it.

    A handler keeps the stream that it was created with, which `Live` does not redirect.
    """
    redirected = []
    loggers = [logging.root, *map(logging.getLogger, logging.root.manager.loggerDict)]
    for proxy in (sys.stdout, sys.stderr):
        stream = getattr(proxy, "rich_proxied_file", None)
        for handler in {handler for logger in loggers for handler in logger.handlers}:
            if stream is not None and isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                handler.setStream(proxy)
                redirected.append((handler, stream))
    return redirected
