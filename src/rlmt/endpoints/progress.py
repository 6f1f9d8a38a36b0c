"""A progress bar for many requests: rate, failures, cost and time left."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from rlmt.endpoints.meter import Meter

SECONDS_BETWEEN_LINES = 60.0
"""Seconds between progress lines where stderr is no terminal."""


class _MeterColumn(ProgressColumn):
    """Rows per second, and with a meter failed attempts and cost so far."""

    def __init__(self, meter: Meter | None) -> None:
        super().__init__()
        self._meter = meter

    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.1f}/s{_meter_text(self._meter)}")


def describe_meter(meter: Meter) -> str:
    """Failed attempts, and cost so far or, if a price is unknown, billed tokens."""
    cost = meter.cost
    tokens = meter.usage.prompt_tokens + meter.usage.completion_tokens
    return f"{meter.failures:,} failed · " + (f"{tokens:,} tokens" if cost is None else f"US$ {cost:.2f}")


def _meter_text(meter: Meter | None) -> str:
    return "" if meter is None else f" · {describe_meter(meter)}"


class RequestProgress:
    """What `track_requests` yields."""

    def __init__(self, progress: Progress, task: TaskID, meter: Meter | None) -> None:
        self._progress, self._task, self._meter = progress, task, meter
        self._printed = monotonic()

    def advance(self, rows: int = 1) -> None:
        """Counts finished rows."""
        self._progress.advance(self._task, rows)
        if not self._progress.console.is_terminal and monotonic() - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = monotonic()
            task = self._progress.tasks[self._task]
            counts = f"{task.completed:,.0f} of {task.total:,.0f}"
            print(f"{task.description}: {counts}{_meter_text(self._meter)}", file=sys.stderr, flush=True)


@contextmanager
def track_requests(what: str, total: int, meter: Meter | None = None) -> Iterator[RequestProgress]:
    """Shows a progress bar on stderr; where that is no terminal, a line a minute and the last state.

    Args:
        what: Label.
        total: Number of rows.
        meter: Counts of the requests; None for rows that are no requests.

    Yields:
        The progress, to be advanced once per row.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _MeterColumn(meter))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, console=Console(stderr=True)) as progress:
        yield RequestProgress(progress, progress.add_task(what, total=total), meter)
