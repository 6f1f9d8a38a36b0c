"""Weights sync to servers: safetensors in a folder that trainer and servers see under the same path.

Each version of the weights has its own folder, written under a temporary name and renamed when it is complete, so no
server reads truncated files. Its name is new, so that no cache of a network file system holds an older version.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rlmt.engines.vllm.lora import write_adapter
from rlmt.engines.vllm_server.weight_transfer import PublishedWeights, WeightTransfer
from rlmt.errors import UserError
from rlmt.types import AdapterWeights

BUCKET_BYTES = 2 * 2**30
"""Bytes of weights per file, which bounds the memory of writing; a larger tensor has a file of its own."""


class SharedFolder(WeightTransfer):
    """This run's part of the shared folder; holds at most one version of the weights and of the adapter.

    Args:
        folder: Path of the shared folder for trainer and servers; other runs may use it as well.
        dtype: Dtype of the written weights.

    Raises:
        UserError: The folder cannot be written to.
    """

    def __init__(self, folder: str, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._option = f"--data.engine.shared_folder {folder}"
        self._weights = ""
        self._root = Path(folder).expanduser().resolve()
        self._owner = f"{socket.gethostname()}-{os.getpid()}"
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            self._own = self._root / f"{self._owner}-{self.run}"
            self._own.mkdir()
        except OSError as error:
            raise UserError(f"{self._option} cannot be written to ({error}): choose another folder.") from error

    def publish(
        self, weights: Iterable[tuple[str, Tensor]] | None, version: int, adapter: AdapterWeights | None = None
    ) -> PublishedWeights:
        """Writes the weights that servers have to load.

        Args:
            weights: Weights as for `write_weights`; None keeps those of the last call.
            version: Version of the policy.
            adapter: The policy's adapter, if it has one.

        Returns:
            Paths and version of the weights.

        Raises:
            UserError: The weights cannot be written, for example on a full disk.
        """
        if weights is not None:
            self._weights = self.write_weights(weights, version)
        adapter_path = None if adapter is None else self.write_adapter(adapter, version)
        return PublishedWeights(self.run, version, self._weights, adapter_path)

    def write_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> str:
        """Writes weights file by file and removes the previous version.

        Args:
            weights: Names and tensors; each tensor is made when it is read, and may be freed when the next one is.
            version: Version of the weights.

        Returns:
            Path of their folder.
        """
        with self._replace_version("weights", version) as folder:
            bucket: dict[str, Tensor] = {}
            files = size = 0
            for name, tensor in weights:
                bucket[name] = tensor.detach().to("cpu", self._dtype, copy=True).contiguous()
                size += bucket[name].nbytes
                if size >= BUCKET_BYTES:
                    save_file(bucket, folder / f"model-{files:05}.safetensors")
                    bucket, files, size = {}, files + 1, 0
            if bucket:
                save_file(bucket, folder / f"model-{files:05}.safetensors")
        return str(self._own / f"weights-{version}")

    def write_adapter(self, adapter: AdapterWeights, version: int) -> str:
        """Writes an adapter in PEFT's format, removes the previous version, and returns the path of its folder."""
        with self._replace_version("adapter", version) as folder:
            write_adapter(adapter, folder)
        return str(self._own / f"adapter-{version}")

    @contextmanager
    def _replace_version(self, kind: str, version: int) -> Iterator[Path]:
        """Yields a temporary folder and renames it when complete; removes the previous version first to save space."""
        temporary = self._own / f"partial-{kind}"
        try:
            for old in self._own.glob(f"{kind}-*"):
                shutil.rmtree(old)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            temporary.rename(self._own / f"{kind}-{version}")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self._option}: the policy's weights cannot be written ({error}); free disk space and resume with "
                "--ckpt_path last."
            ) from error

    def _remove_abandoned(self) -> None:
        """Removes the folders of runs on this machine that were killed."""
        for folder in self._root.glob(f"{socket.gethostname()}-*-*"):
            process = folder.name.removeprefix(f"{socket.gethostname()}-").split("-")[0]
            if process.isdigit() and not _is_alive(int(process)):
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Removes everything that this run has written."""
        shutil.rmtree(self._own, ignore_errors=True)


def _is_alive(process: int) -> bool:
    """Whether a process of this id runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
