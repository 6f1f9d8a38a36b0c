"""Checkpoint files: written atomically, and read as tensors and plain data only."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from rlmt.errors import UserError

UNFINISHED = ".unfinished"
"""Suffix of a file that is being written; one that exists when a run starts was left by a killed run."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file beside the target, flushes it to the disk and renames it: no reader sees half a file.

    Lightning's own CheckpointIO first copies the checkpoint in memory, then writes it to the system's temporary folder,
    from where it is copied, not renamed, if the target is on another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint; an existing file is replaced only when the new one is complete.

        Args:
            checkpoint: Tensors and plain data.
            path: Path of a local file.
            storage_options: Not used.

        Raises:
            OSError: The file cannot be written, for example because the disk is full; no partial file remains.
        """
        with atomic_write(Path(path)) as unfinished, unfinished.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's zip writer hides the exception that the file raised
                cause = error.__cause__ or error.__context__
                raise cause if isinstance(cause, OSError) else OSError(str(error).splitlines()[0]) from error
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint without running code in it, whatever `weights_only` says.

        The file is memory-mapped: tensors are read when they are used, and ranks of one machine share the memory.

        Raises:
            UserError: The file does not exist, is damaged, or holds more than tensors and plain data.
        """
        return read_checkpoint(Path(path), map_location=map_location, mmap=True)


def read_checkpoint(path: Path, **options: Any) -> dict[str, Any]:
    """Reads a checkpoint of tensors and plain data.

    Args:
        path: Path of the file.
        **options: Options of `torch.load`.

    Raises:
        UserError: The file does not exist, is damaged, or holds more than tensors and plain data.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, weights_only=True, **options)
    except FileNotFoundError as error:
        raise UserError(f"{path}: the checkpoint does not exist; give one that `rlmt fit` wrote.") from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise UserError(
            f"{path}: the checkpoint is damaged (truncated?), or holds objects other than tensors and plain data; "
            "give a checkpoint that `rlmt fit` wrote."
        ) from error
    return checkpoint


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which replaces `path` at the end and is removed on an error.

    Args:
        path: Path of the file to write; its folder is created if it does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # otherwise a power failure could lose the new name
    finally:
        os.close(folder)


def remove_unfinished(folder: Path) -> list[Path]:
    """Removes the unfinished files that a killed run left in a folder, and returns their paths."""
    found = sorted(folder.glob(f".*{UNFINISHED}")) if folder.is_dir() else []
    for path in found:
        path.unlink(missing_ok=True)
    return found
