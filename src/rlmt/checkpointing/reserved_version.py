"""The number of a run that has logged nothing yet, so that `version_N` only exists for runs with a first step."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


class ReservedVersion:
    """Reserves `version_N` by the hidden folder `.version_N`, which is locked as long as the process lives.

    The lock of a killed process is gone, so the next start takes its number. On a file system without locks the folder
    alone reserves the number, and a killed start costs it.

    Args:
        folder: The hidden folder.
        descriptor: Open file descriptor of the folder, which holds the lock.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder = folder
        self._descriptor = descriptor

    @classmethod
    def take(cls, root: Path, version: int) -> ReservedVersion | None:
        """Reserves a number; None if another run has it.

        Args:
            root: Folder with the `version_N` of several runs.
            version: The number.
        """
        folder = root / f".version_{version}"
        try:
            folder.mkdir(parents=True)
            created = True
        except FileExistsError:
            created = False
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # the other run has just released it
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())
        except BlockingIOError:
            locked = False
        except OSError:  # no locks on this file system
            locked = created
        if not locked:
            os.close(descriptor)
            return None
        reserved = cls(folder, descriptor)
        if (root / f"version_{version}").exists():
            reserved.release()
            return None
        return reserved

    def release(self) -> None:
        """Removes the hidden folder, and with it the lock."""
        with suppress(OSError):
            self.folder.rmdir()
        os.close(self._descriptor)
