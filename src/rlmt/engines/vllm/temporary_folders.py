"""Folders for an engine's temporary files, removed after use or at the next start if the process was killed; checks."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from rlmt.distributed import collectives
from rlmt.errors import UserError
from rlmt.options import check_writable

_MEMORY = Path("/dev/shm")
_PREFIX = "rlmt-scratch-"
_LOCK = ".in-use"


class TemporaryFolder:
    """A new folder with a unique name; as a context manager it yields its path and removes the folder at the end.

    The process holds a lock on a file in the folder as long as it lives. So another process can distinguish a folder in
    use from an abandoned one, whatever their process ids, users and containers are.

    Args:
        kind: A word for the folder's name.
        memory_bytes: Bytes that this rank writes, to create it in shared memory if the system has room there for as
            much from every rank; None creates it on disk.
    """

    def __init__(self, kind: str, memory_bytes: int | None = None) -> None:
        parent = None if memory_bytes is None else _shared_memory(memory_bytes * collectives.world_size())
        self.path = tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}-", dir=parent)
        self._lock = _open_lock(self.path)
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


class ContentFolder:
    """A folder that is named by its content, so that equal content has the same path in every process and run.

    vLLM's compile cache depends on the path of the model. Processes share the folder: each holds a shared lock on a
    file in it, and the last one removes the folder.

    Args:
        kind: A word for the folder's name.
        write: Writes the content into the folder whose path it receives.
    """

    def __init__(self, kind: str, write: Callable[[str], None]) -> None:
        own = tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}-")
        self._lock = _open_lock(own)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        write(own)
        self.path = os.path.join(os.path.dirname(own), f"{_PREFIX}{kind}-{os.getuid()}-{_digest(Path(own))}")
        while not self._take(own):  # the folder was removed between two calls of _take
            pass

    def _take(self, own: str) -> bool:
        """Moves `own` to the path, or locks the folder there and removes `own`; False if that folder vanished."""
        with suppress(OSError):  # the path exists
            os.rename(own, self.path)
            return True
        try:
            foreign = os.stat(self.path).st_uid != os.getuid()
            lock = -1 if foreign else os.open(os.path.join(self.path, _LOCK), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        if foreign:  # another user could change what is in it
            self.path = own
            return True
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not _is_current(lock, self.path):
            os.close(lock)
            return False
        shutil.rmtree(own, ignore_errors=True)
        os.close(self._lock)
        self._lock = lock
        return True

    def close(self) -> None:
        """Removes the folder if no other process uses it; harmless when called twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
            _remove_unused(Path(self.path))


def remove_abandoned() -> list[Path]:
    """Removes the folders of processes that have ended.

    Returns:
        Paths of the removed folders.
    """
    parents = {Path(tempfile.gettempdir()), *filter(None, [_shared_memory()])}
    return [folder for parent in sorted(parents) for folder in parent.glob(f"{_PREFIX}*") if _remove_unused(folder)]


def check_folders(compiles: bool) -> None:
    """Checks that temporary files and vLLM's compiled code can be written.

    Args:
        compiles: Whether vLLM compiles, and so writes to its cache.

    Raises:
        UserError: They cannot.
    """
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise UserError(f"TMPDIR: no folder of temporary files can be written ({error.strerror}); set it.") from error
    if compiles:
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "vllm")
        cache = Path(os.environ.get("VLLM_CACHE_ROOT", cache)).expanduser()
        check_writable(cache, "vLLM's cache", "set VLLM_CACHE_ROOT to a folder that can be written")


def _shared_memory(size: int = 0) -> Path | None:
    """The system's shared-memory folder if it is writable and has `size` bytes left, or None."""
    if not (_MEMORY.is_dir() and os.access(_MEMORY, os.W_OK)):
        return None
    if shutil.disk_usage(_MEMORY).free < size:  # containers have 64 MB by default
        _warn_of_small_memory(f"{_MEMORY}", -(-size // 2**20))
        return None
    return _MEMORY


@functools.cache
def _warn_of_small_memory(folder: str, mebibytes: int) -> None:
    """Warns once."""
    rank_zero_warn(
        f"{folder} has less than the {mebibytes:,} MiB that the adapters of all ranks take, so they go to "
        f"{tempfile.gettempdir()}, which is slower; give a container more shared memory (docker run --shm-size)."
    )


def _open_lock(folder: str) -> int:
    """Creates and opens the lock file of a folder."""
    return os.open(os.path.join(folder, _LOCK), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)


def _is_current(lock: int, folder: str) -> bool:
    """Whether an open lock file is the one that is in the folder now."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(os.path.join(folder, _LOCK)))
    except FileNotFoundError:
        return False


def _digest(folder: Path) -> str:
    """Hash of the names and bytes of a folder's files, the lock file excluded."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _LOCK):
        for part in (str(file.relative_to(folder)).encode(), file.read_bytes()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:32]


def _remove_unused(folder: Path) -> bool:
    """Removes a folder if no process holds its lock; returns whether it did."""
    with suppress(OSError):  # another user's folder, a folder removed meanwhile, or one whose lock is held
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Renamed first, so that a process that waits for the lock never finds a part of the folder.
            removed = folder.with_name(f"{folder.name}-{os.getpid()}")
            folder.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)
            return True
        finally:
            os.close(lock)
    return False
