"""Folders for an engine's passing files: gone when it is done with them, and after a kill at the next start."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_MEMORY = Path("/dev/shm")
_PREFIX = "rlmt-scratch-"
_LOCK = ".in-use"


class TemporaryFolder:
    """A new folder of a name of its own; a context manager that gives its path and removes it.

    A file in it is locked as long as the process lives, so another process can tell it from one that was left behind,
    whatever their process ids, users and containers are.

    Args:
        kind: a word for its name.
        in_memory: whether it shall be in memory where the system has such a place.
    """

    def __init__(self, kind: str, in_memory: bool = False) -> None:
        self.path = tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}-", dir=_memory() if in_memory else None)
        self._lock = os.open(os.path.join(self.path, _LOCK), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Removes the folder; harmless when called twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *raised: object) -> None:
        self.close()


def remove_abandoned() -> list[Path]:
    """Removes the folders whose process is gone, and returns them."""
    places = {Path(tempfile.gettempdir()), *filter(None, [_memory()])}
    found = [folder for place in sorted(places) for folder in place.glob(f"{_PREFIX}*") if _abandoned(folder)]
    for folder in found:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _memory() -> Path | None:
    return _MEMORY if _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK) else None


def _abandoned(folder: Path) -> bool:
    with suppress(OSError):  # another user's, or gone meanwhile, or locked: in use
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        finally:
            os.close(lock)
    return False
