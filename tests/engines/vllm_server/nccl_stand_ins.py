"""Communicators in place of NCCL's, for vLLM's weight transfer on machines without a GPU.

Everything else is vLLM's own: its NCCL engines of both sides, their packing and their updates of the model. `install`
replaces the communicator with its unique id, and what exists on GPUs alone: streams and the device's index. vLLM
servers install it as a plugin (`plugin_folder`). The module imports neither rlmt nor other tests.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore


class GlooCommunicator:
    """Over gloo, between processes."""

    stores: dict[bytes, TCPStore] = {}
    """The store behind each unique id that this process made."""

    @classmethod
    def unique_id(cls) -> bytes:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        unique_id = f"127.0.0.1:{store.port}".encode().ljust(128, b"\0")
        cls.stores[unique_id] = store
        return unique_id

    def __init__(self, unique_id: bytes, rank: int, world_size: int) -> None:
        host, port = unique_id.rstrip(b"\0").decode().split(":")
        store = self.stores[unique_id] if rank == 0 else TCPStore(host, int(port), is_master=False)
        self.group: Any = ProcessGroupGloo(PrefixStore("gloo", store), rank, world_size, timedelta(seconds=300))
        self.disabled = False

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        if not self.disabled:
            options = BroadcastOptions()
            options.rootRank = src
            self.group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        self.disabled = True


class ThreadCommunicator:
    """Between threads. As with NCCL, members wait for a missing one for ever, until they destroy their communicator."""

    groups: dict[bytes, ThreadCommunicator] = {}
    """The first member of each group."""
    lock = threading.Lock()

    @classmethod
    def unique_id(cls) -> bytes:
        return os.urandom(128)

    @classmethod
    def destroy_all(cls) -> None:
        """Lets all threads go on that still wait."""
        for first in cls.groups.values():
            first.barrier.abort()
        cls.groups.clear()

    def __init__(self, unique_id: bytes, rank: int, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size)
        with self.lock:
            self.first = self.groups.setdefault(unique_id, self)
        self.barrier, self.rank, self.disabled = self.first.barrier, rank, False
        self.barrier.wait()

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        try:
            if self.rank == src:
                self.first.tensor = tensor
            self.barrier.wait()  # until it is there
            if self.rank != src:
                tensor.copy_(self.first.tensor)
            self.barrier.wait()  # until all have it
        except threading.BrokenBarrierError:
            if not self.disabled:
                raise

    def destroy(self) -> None:
        self.disabled = True
        self.barrier.abort()


class Stream:
    """A stream on which everything is done at once."""

    def synchronize(self) -> None:
        pass


def install(replace: Callable[[Any, str, Any], None] = setattr, communicator: Any = GlooCommunicator) -> None:
    """Replaces NCCL in this process.

    Args:
        replace: Sets an attribute of a module; `MonkeyPatch.setattr` in tests.
        communicator: The class in place of vLLM's PyNcclCommunicator.
    """
    from vllm.distributed.device_communicators import pynccl_wrapper
    from vllm.distributed.weight_transfer import nccl_common, packed_tensor

    class Library:
        def ncclGetUniqueId(self) -> Any:  # noqa: N802
            return pynccl_wrapper.ncclUniqueId.from_buffer_copy(communicator.unique_id())

    def join(unique_id: bytes, rank: int, world_size: int, device: Any) -> Any:
        return communicator(unique_id, rank, world_size)

    replace(nccl_common, "uid_init_process_group", join)
    replace(pynccl_wrapper, "NCCLLibrary", Library)
    replace(packed_tensor, "_get_streams", lambda device, count: (Stream(),) * count)
    replace(torch.accelerator, "current_device_index", lambda: 0)


def plugin_folder(folder: Path) -> Path:
    """Writes an entry point of `install` for vLLM's plugins into a folder, for PYTHONPATH, and returns the folder."""
    info = folder / "nccl_stand_ins-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nccl-stand-ins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ngloo = nccl_stand_ins:install\n")
    (folder / Path(__file__).name).symlink_to(__file__)
    return folder
