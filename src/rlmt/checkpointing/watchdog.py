"""A limit on how long one piece of work may take: a run that hangs ends, instead of holding its GPU all weekend."""

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
"""Exit status of a run that hung (EX_TEMPFAIL of sysexits.h: try again later)."""

GRACE = 60.0
"""Seconds that the run is given to save and leave by itself, where it still obeys."""

_STDERR = 2
"""The process's own, since faulthandler writes to a descriptor and not to what took the place of sys.stderr."""


class TimedOut(SystemExit):
    """Work that came to no end was stopped; the exit status is `STATUS`."""

    def __init__(self, message: str) -> None:
        super().__init__(STATUS)
        self.message = message


@contextmanager
def time_limit(seconds: float | None, what: str, option: str) -> Iterator[None]:
    """Ends the process if the work inside takes longer.

    A thread then says so, prints where every thread stands, and sends SIGTERM: a run that waits in Python saves what it
    has and leaves. One that does not for another minute, since it hangs in C, is ended with status 75; the last
    checkpoint is whole. For work that holds Python's lock, where no thread of Python can act, there is a limit in C.

    Args:
        seconds: the limit; None is none.
        what: who is at work, for the message.
        option: the option that the limit comes from.

    Raises:
        Hung: the work came to an end, or was stopped, after the limit.
    """
    if seconds is None:
        yield
        return
    done, late = threading.Event(), threading.Event()

    def watch() -> None:
        if done.wait(seconds):
            return
        late.set()
        print(f"rlmt: error: {what} has not answered for {seconds:g} s ({option}); the run ends.", file=sys.stderr)
        sys.stderr.flush()
        faulthandler.dump_traceback(file=_STDERR)
        os.kill(os.getpid(), signal.SIGTERM)
        if not done.wait(GRACE):
            os._exit(STATUS)

    watcher = threading.Thread(target=watch, name="rlmt-watchdog", daemon=True)
    faulthandler.dump_traceback_later(seconds + 2 * GRACE, exit=True, file=_STDERR)
    watcher.start()
    hung = TimedOut(f"{what} took longer than {seconds:g} s ({option})")
    try:
        yield
    except StoppedBySignal as stopped:
        if late.is_set():
            raise hung from stopped
        raise
    finally:
        done.set()
        faulthandler.cancel_dump_traceback_later()
        watcher.join()
    if late.is_set():
        raise hung
