"""Processes that end with the one that started them, and locks that end with their process."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlmt.errors import UserError

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def end_with_parent(number: signal.Signals, parent: int | None = None) -> None:
    """Makes the system send this process a signal when its parent dies, however that dies.

    Args:
        number: The signal.
        parent: Process id of the parent, which is 1 if a container runs `rlmt`; None if it is any but 1.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, number)
    dead = os.getppid() == 1 if parent is None else os.getppid() != parent
    if dead:  # before the call above
        os.kill(os.getpid(), number)


@contextmanager
def locked(folder: Path, error: str | None = None) -> Iterator[None]:
    """Holds the lock of a folder; the system releases it when the process ends.

    Args:
        folder: The folder. The lock is a file beside it, so that the folder can be removed.
        error: Message of the UserError if another process holds the lock; None waits for it.

    Raises:
        UserError: Another process holds the lock.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if error else 0))
        except BlockingIOError:
            raise UserError(error or "") from None
        yield
    finally:
        os.close(descriptor)
