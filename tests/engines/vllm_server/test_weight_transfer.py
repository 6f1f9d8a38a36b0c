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

from rlmt.engines.vllm_server import weight_transfer
from rlmt.engines.vllm_server.weight_transfer import SharedFolder
from rlmt.errors import UserError
from rlmt.types import AdapterWeights


def test_weights_come_back_from_files_of_a_bucket_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_transfer, "BUCKET", 100)
    tied = torch.randn(6, 4)
    weights = {"a": tied, "b": torch.randn(3).to(torch.float16), "c": torch.randn(4, 6).T, "head": tied}
    folder = SharedFolder(str(tmp_path / "new" / "place"), torch.bfloat16)
    path = Path(folder.write_weights(weights.items(), 7))
    files = sorted(path.iterdir())
    assert [sorted(load_file(file)) for file in files] == [["a", "b", "c"], ["head"]]  # 48 + 6 + 48 bytes, and 48
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(found[name], tensor.to(torch.bfloat16)) for name, tensor in weights.items())
    second = Path(folder.write_weights(weights.items(), 8))
    assert second != path and not path.exists()
    adapter = AdapterWeights({"r": 1}, {"x": torch.ones(1)})
    slots = [Path(folder.write_adapter(adapter, version)) for version in (8, 9)]
    assert [slot.exists() for slot in slots] == [False, True] and second.exists()
    assert {file.name for file in slots[1].iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    folder.remove()
    assert not list((tmp_path / "new/place").iterdir())


def test_what_is_not_whole_has_no_name(tmp_path: Path) -> None:
    folder = SharedFolder(str(tmp_path), torch.float32)

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.write_weights(broken(), 1)
    assert not list(tmp_path.rglob("weights-*")) and not list(tmp_path.rglob("*.safetensors"))
    assert Path(folder.write_weights([("a", torch.ones(1))], 1)).is_dir()


def test_writing_takes_the_memory_of_a_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocated_peak: Callable[[Callable[[], None]], int]
) -> None:
    """Twenty tensors of a MiB each, files of two: one more is being made when a bucket is full."""
    monkeypatch.setattr(weight_transfer, "BUCKET", 2 * 2**20)
    folder = SharedFolder(str(tmp_path), torch.float32)
    weights = {str(i): torch.ones(2**18) for i in range(20)}
    peak = allocated_peak(lambda: folder.write_weights(weights.items(), 1) and None)
    assert 2 * 2**20 <= peak <= 3.1 * 2**20


def test_what_killed_runs_have_left_goes_and_that_of_others_stays(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {
        f"{socket.gethostname()}-{gone.pid}-abc": False,
        f"{socket.gethostname()}-{os.getppid()}-abc": True,
        f"elsewhere-{gone.pid}-abc": True,
        "my-own-files": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
    SharedFolder(str(tmp_path), torch.float32)
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--data.engine.shared_folder .*/file/x cannot be written to: "):
        SharedFolder(str(tmp_path / "file" / "x"), torch.float32)
