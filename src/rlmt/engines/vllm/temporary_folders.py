"""Folders for an engine's temporary files, removed after use, or at the next start if the process was killed."""

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
    """A new folder with a unique name; as a context manager it yields its path and removes the folder at the end.

    The process holds a lock on a file in the folder as long as it lives. So another process can distinguish a folder in
    use from an abandoned one, whatever their process ids, users and containers are.

    Args:
        kind: A word for the folder's name.
        in_memory: Whether to create it in shared memory, where the system has it.
    """

    def __init__(self, kind: str, in_memory: bool = False) -> None:
        self.path = tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}-", dir=_shared_memory() if in_memory else None)
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
    """Removes the folders of processes that have ended.

    Returns:
        Paths of the removed folders.
    """
    parents = {Path(tempfile.gettempdir()), *filter(None, [_shared_memory()])}
    found = [folder for parent in sorted(parents) for folder in parent.glob(f"{_PREFIX}*") if _is_abandoned(folder)]
    for folder in found:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _shared_memory() -> Path | None:
    """The system's shared-memory folder if it is writable, or None."""
    return _MEMORY if _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK) else None


def _is_abandoned(folder: Path) -> bool:
    """Whether no process holds the folder's lock."""
    with suppress(OSError):  # another user's folder, a folder removed meanwhile, or one whose lock is held
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        finally:
            os.close(lock)
    return False
