"""Reads sharded checkpoint folders (torch.distributed.checkpoint's .distcp files) in a single process.

Their metadata is a pickle, which torch reads without restrictions. It is checked first, so that no code in it runs.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from rlmt.checkpointing.files import read_checkpoint
from rlmt.errors import UserError

_ALLOWED = {
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
}
"""Names that a pickle may reference, by module; exact names, since a dotted one would reach a module's imports."""


class _RestrictedUnpickler(pickle.Unpickler):
    """Creates only torch's records of where shards are stored."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_sharded_checkpoint(folder: Path, prefix: str) -> dict[str, Any]:
    """Reads a checkpoint folder that FSDP wrote: weights from the shards, everything else from meta.pt.

    Args:
        folder: The checkpoint folder.
        prefix: Prefix of the names of the weights to read; others are skipped.

    Returns:
        The checkpoint as a single process would write it, with these weights under `state_dict`.

    Raises:
        UserError: The folder is no sharded checkpoint, is damaged, or holds more than tensors and plain values.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    if not ((folder / ".metadata").is_file() and (folder / "meta.pt").is_file()):
        raise UserError(
            f"{folder}: the folder is not a sharded checkpoint (.metadata or meta.pt is missing); pass a checkpoint of "
            "`rlmt fit`."
        )
    _check_metadata(folder / ".metadata")
    reader = FileSystemReader(folder)
    tensors: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(f"state_dict.{prefix}") and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        load(tensors, storage_reader=reader, no_dist=True)
    weights = {name.removeprefix("state_dict."): tensor for name, tensor in tensors.items()}
    return {**read_checkpoint(folder / "meta.pt", map_location="cpu", mmap=True), "state_dict": weights}


def _check_metadata(path: Path) -> None:
    """Raises UserError if the pickle would create anything but plain records, before torch reads it."""
    try:
        with path.open("rb") as file:
            _RestrictedUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise UserError(
            f"{path}: the file is damaged, or holds objects other than tensors and plain values; pass a checkpoint of "
            "`rlmt fit`."
        ) from error
