"""A time limit for one operation, so that a run that hangs ends and frees its GPU."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rlmt.checkpointing.signals import StoppedBySignal

STATUS = 75
"""Exit status after a timeout (EX_TEMPFAIL of sysexits.h: try again later)."""

GRACE = 60.0
"""Seconds in which the run can save and exit by itself."""

_STDERR = 2
"""File descriptor of stderr: faulthandler cannot write to an object that replaces sys.stderr."""


class TimedOut(SystemExit):
    """An operation exceeded its time limit; the exit status is `STATUS`."""

    def __init__(self, message: str) -> None:
        super().__init__(STATUS)
        self.message = message


@contextmanager
def time_limit(seconds: float | None, what: str, option: str) -> Iterator[None]:
    """Ends the process if the code inside takes longer.

    A thread then prints a message and the stack of every thread, and sends SIGTERM: a run that waits in Python saves a
    checkpoint and exits. A run that hangs in C is ended after another minute with status 75; the last checkpoint is
    complete. If the hanging code holds the GIL, no Python thread runs, and faulthandler's timer in C ends the process.

    Args:
        seconds: Time limit in seconds; None for no limit.
        what: Name of the operation for the message.
        option: Option that sets the limit, for the message.

    Raises:
        TimedOut: The code inside ended, or was stopped, after the limit.
    """
    if seconds is None:
        yield
        return
    done, timed_out = threading.Event(), threading.Event()

    def watch() -> None:
        if done.wait(seconds):
            return
        timed_out.set()
        print(f"rlmt: error: {what} has not answered for {seconds:g} s ({option}); the run ends.", file=sys.stderr)
        sys.stderr.flush()
        faulthandler.dump_traceback(file=_STDERR)
        os.kill(os.getpid(), signal.SIGTERM)
        if not done.wait(GRACE):
            os._exit(STATUS)

    watcher = threading.Thread(target=watch, name="rlmt-watchdog", daemon=True)
    faulthandler.dump_traceback_later(seconds + 2 * GRACE, exit=True, file=_STDERR)
    watcher.start()
    timeout = TimedOut(f"{what} took longer than {seconds:g} s ({option})")
    try:
        yield
    except StoppedBySignal as stopped:
        if timed_out.is_set():
            raise timeout from stopped
        raise
    finally:
        done.set()
        faulthandler.cancel_dump_traceback_later()
        watcher.join()
    if timed_out.is_set():
        raise timeout
