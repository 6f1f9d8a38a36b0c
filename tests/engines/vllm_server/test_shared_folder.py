"""SharedFolder: files, memory, atomic versions and clean-up."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlmt.engines.vllm_server import shared_folder
from rlmt.engines.vllm_server.shared_folder import SharedFolder
from rlmt.errors import UserError
from rlmt.types import AdapterWeights


def test_weights_round_trip_through_bucket_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "BUCKET_BYTES", 100)
    tied = torch.randn(6, 4)
    weights = {"a": tied, "b": torch.randn(3).to(torch.float16), "c": torch.randn(4, 6).T, "head": tied}
    folder = SharedFolder(str(tmp_path / "new" / "folder"), torch.bfloat16)
    path = Path(folder.write_weights(weights.items(), 7))
    files = sorted(path.iterdir())
    assert [sorted(load_file(file)) for file in files] == [["a", "b", "c"], ["head"]]  # 48 + 6 + 48 bytes, and 48
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(found[name], tensor.to(torch.bfloat16)) for name, tensor in weights.items())
    second = Path(folder.write_weights(weights.items(), 8))
    assert second != path and not path.exists()
    adapter = AdapterWeights({"r": 1}, {"x": torch.ones(1)})
    adapters = [Path(folder.write_adapter(adapter, version)) for version in (8, 9)]
    assert [path.exists() for path in adapters] == [False, True] and second.exists()
    assert {file.name for file in adapters[1].iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    folder.close()
    assert not list((tmp_path / "new/folder").iterdir())


def test_incomplete_version_has_no_final_name(tmp_path: Path) -> None:
    folder = SharedFolder(str(tmp_path), torch.float32)

    def interrupted() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.write_weights(interrupted(), 1)
    assert not list(tmp_path.rglob("weights-*")) and not list(tmp_path.rglob("*.safetensors"))
    assert Path(folder.write_weights([("a", torch.ones(1))], 1)).is_dir()


def test_memory_of_writing_is_one_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocated_peak: Callable[[Callable[[], None]], int]
) -> None:
    """Twenty tensors of 1 MiB, buckets of 2 MiB: one more tensor is being made when a bucket is full."""
    monkeypatch.setattr(shared_folder, "BUCKET_BYTES", 2 * 2**20)
    folder = SharedFolder(str(tmp_path), torch.float32)
    weights = {str(i): torch.ones(2**18) for i in range(20)}
    peak = allocated_peak(lambda: folder.write_weights(weights.items(), 1) and None)
    assert 2 * 2**20 <= peak <= 3.1 * 2**20


def test_folders_of_killed_runs_are_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {
        f"{socket.gethostname()}-{ended.pid}-abc": False,
        f"{socket.gethostname()}-{os.getppid()}-abc": True,
        f"elsewhere-{ended.pid}-abc": True,
        "my-own-files": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
    SharedFolder(str(tmp_path), torch.float32)
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_unwritable_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match="--data.engine.shared_folder .*/file/x cannot be written to .*: choose another"
    ):
        SharedFolder(str(tmp_path / "file" / "x"), torch.float32)
