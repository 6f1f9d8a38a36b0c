"""Progress within a step: the code on the data path reports it, and a progress bar that listens shows it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Protocol, TypeVar

T_co = TypeVar("T_co", covariant=True)


class _Batches(Iterable[T_co], Sized, Protocol[T_co]):
    """A collection whose length is known."""


Listener = Callable[[str, int, int | None], None]
"""Receives the phase, the number of units done, and their total; None where the total is not known."""

_listeners: list[Listener] = []


def report(phase: str, done: int = 0, total: int | None = None) -> None:
    """Reports the phase of the current step; nothing happens if no progress bar listens.

    Calls from other threads are ignored: with `rollout_lag` the next rollout is generated in a thread of its own, while
    this step is in another phase.

    Args:
        phase: What the step does, such as `sampling`.
        done: Number of units of the phase that are done.
        total: Number of units of the phase; None if it is not known.
    """
    if _listeners and threading.current_thread() is threading.main_thread():
        for listener in _listeners:
            listener(phase, done, total)


def track(phase: str, units: _Batches[T_co]) -> Iterator[T_co]:
    """Yields each unit of a phase, and reports how many are done."""
    for done, unit in enumerate(units):
        report(phase, done, len(units))
        yield unit


@contextmanager
def busy(text: str) -> Iterator[None]:
    """Shows a spinner and a text on stderr, if that is a terminal, while the code inside runs; leaves stdout alone."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner

    console = Console(stderr=True)
    with Live(Spinner("dots", text), console=console, transient=True, redirect_stdout=False, redirect_stderr=False):
        yield


def listen(listener: Listener) -> None:
    """Passes all later reports to a listener, until `ignore`."""
    _listeners.append(listener)


def ignore(listener: Listener) -> None:
    """Ends `listen`; harmless if the listener does not listen."""
    if listener in _listeners:
        _listeners.remove(listener)
