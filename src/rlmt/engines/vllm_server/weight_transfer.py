"""Weights on their way to servers: safetensors in a folder that trainer and servers see under the same path.

A set of weights is a folder of its own, written beside its final name and renamed when it is whole, so no server reads
half of it. Each has a new name, which no cache of a network file system knows.
"""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rlmt.engines.vllm.lora import write_adapter
from rlmt.engines.weights import track_loaded
from rlmt.errors import UserError
from rlmt.types import AdapterWeights

BUCKET = 2 * 2**30
"""Bytes of weights in a file, and so the memory that writing takes; a larger tensor has a file to itself."""


@dataclass(frozen=True)
class PublishedWeights:
    """The weights that servers have to hold."""

    run: str
    """Name of the run, distinct from that of any other."""
    version: int
    """Version of the policy."""
    weights: str
    """Folder of all weights: the policy's, or its frozen base's."""
    adapter: str | None = None
    """Folder of the adapter that makes the policy of them, in PEFT's format."""

    @property
    def prefix(self) -> str:
        """What the labels of all of this run's weights begin with."""
        return f"rlmt-{self.run}-"

    @property
    def label(self) -> str:
        """What the label of a server that holds them begins with, up to a dot; also the adapter's name there."""
        return f"{self.prefix}{self.version}"


class SharedFolder:
    """This run's part of the shared folder: never more than one set of weights and one adapter.

    Args:
        folder: the folder as trainer and servers see it; other runs may use it, too.
        dtype: number format to write weights in.

    Raises:
        UserError: it cannot be written to.
    """

    def __init__(self, folder: str, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._given = folder
        self._written = ""
        self._place = Path(folder).expanduser().resolve()
        self._owner = f"{socket.gethostname()}-{os.getpid()}"
        self.run = uuid.uuid4().hex[:12]
        try:
            self._place.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self._own = self._place / f"{self._owner}-{self.run}"
            self._own.mkdir()
        except OSError as error:
            raise UserError(f"--data.engine.shared_folder {folder} cannot be written to: {error}") from error

    def publish(
        self,
        weights: Iterable[tuple[str, Tensor]] | None,
        names: Iterable[str],
        version: int,
        adapter: AdapterWeights | None = None,
    ) -> PublishedWeights:
        """Writes what servers have to hold.

        Args:
            weights: as for `write_weights`; None leaves those that are there.
            names: that have to be among them.
            version: of the policy.
            adapter: the policy's, if it has one.

        Raises:
            ValueError: a name is missing; the servers would keep a stale weight.
            UserError: they cannot be written, as on a full disk.
        """
        if weights is not None:
            missing = set(names)
            self._written = self.write_weights(track_loaded(weights, missing), version)
            if missing:
                raise ValueError(f"{len(missing)} of the policy's weights were not passed to sync, as {min(missing)}")
        slot = None if adapter is None else self.write_adapter(adapter, version)
        return PublishedWeights(self.run, version, self._written, slot)

    def write_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> str:
        """Writes weights file by file, in place of those before.

        Args:
            weights: by name, made as they are read; each may be gone once the next one is asked for.
            version: theirs.

        Returns:
            Path of their folder.
        """
        with self._replacing("weights", version) as folder:
            bucket: dict[str, Tensor] = {}
            files = size = 0
            for name, tensor in weights:
                bucket[name] = tensor.detach().to("cpu", self._dtype, copy=True).contiguous()
                size += bucket[name].nbytes
                if size >= BUCKET:
                    save_file(bucket, folder / f"model-{files:05}.safetensors")
                    bucket, files, size = {}, files + 1, 0
            if bucket:
                save_file(bucket, folder / f"model-{files:05}.safetensors")
        return str(self._own / f"weights-{version}")

    def write_adapter(self, adapter: AdapterWeights, version: int) -> str:
        """Writes an adapter in PEFT's format, in place of the one before, and returns the path of its folder."""
        with self._replacing("adapter", version) as folder:
            write_adapter(adapter, folder)
        return str(self._own / f"adapter-{version}")

    @contextmanager
    def _replacing(self, kind: str, version: int) -> Iterator[Path]:
        """A folder to write into, which then gets its name; that of an earlier version goes first, to save room."""
        partial = self._own / f"partial-{kind}"
        try:
            for old in self._own.glob(f"{kind}-*"):
                shutil.rmtree(old)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            partial.rename(self._own / f"{kind}-{version}")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"--data.engine.shared_folder {self._given}: the policy's weights cannot be written there ({error}); "
                "make room, and go on with --ckpt_path last"
            ) from error

    def _sweep(self) -> None:
        """Removes what runs on this machine have left that were killed."""
        for folder in self._place.glob(f"{socket.gethostname()}-*-*"):
            process = folder.name.removeprefix(f"{socket.gethostname()}-").split("-")[0]
            if process.isdigit() and not _alive(int(process)):
                shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        """Removes all that this run has written."""
        shutil.rmtree(self._own, ignore_errors=True)


def _alive(process: int) -> bool:
    """Whether this machine has a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
