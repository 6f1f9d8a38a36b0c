"""Checkpoint files that are whole or not there, and that hold plain data only."""

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
"""Ending of a file that is being written; one that is there at the start of a run was left by a kill."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, forces the bytes to the disk and renames, so no reader ever sees half a checkpoint.

    Lightning's own goes through a copy of the checkpoint in memory and a file in the system's temporary folder, which
    on another disk is copied and not renamed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint; one of that name stays as it is until the new one is complete.

        Args:
            checkpoint: tensors and plain data.
            path: a local file.
            storage_options: none are known.

        Raises:
            OSError: it cannot be written, as on a full disk; nothing is left of it.
        """
        with atomic_write(Path(path)) as unfinished, unfinished.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's zip writer does not pass on what the file raised
                cause = error.__cause__ or error.__context__
                raise cause if isinstance(cause, OSError) else OSError(str(error).splitlines()[0]) from error
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint; whatever the caller asks for, no code in it is run.

        Raises:
            UserError: it is not there, is damaged, or holds more than tensors and plain data.
        """
        return read_checkpoint(Path(path), map_location=map_location)


def read_checkpoint(path: Path, **options: Any) -> dict[str, Any]:
    """Reads a checkpoint of tensors and plain data.

    Args:
        path: a file.
        **options: of `torch.load`.

    Raises:
        UserError: it is not there, is damaged, or holds more than that.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, weights_only=True, **options)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such checkpoint; give one that `rlmt fit` wrote.") from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise UserError(
            f"{path}: is damaged (cut short?), or holds objects other than tensors and plain data; "
            "give a checkpoint that `rlmt fit` wrote."
        ) from error
    return checkpoint


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A name in the same folder to write to; the file takes the place of `path` at the end, or is removed on an error.

    Args:
        path: what is written; its folder is made.
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
        os.fsync(folder)  # or the new name could be lost with the power
    finally:
        os.close(folder)


def remove_unfinished(folder: Path) -> list[Path]:
    """Removes what a kill left half-written in a folder, and returns it."""
    found = sorted(folder.glob(f".*{UNFINISHED}")) if folder.is_dir() else []
    for path in found:
        path.unlink(missing_ok=True)
    return found
