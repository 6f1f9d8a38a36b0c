"""Weights sync by vLLM's weight transfer to fake servers, with threads in place of NCCL's ranks, and its checks."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nccl_stand_ins
import pytest
import torch
from fake_server import LORA, SAMPLING, FakeServer, answer_with, check_samples, requests, start, sync
from torch import Tensor

from rlmt.engines import VLLMServerEngine
from rlmt.engines.vllm_server import nccl
from rlmt.errors import UserError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture
def servers(fakes: list[FakeServer], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeServer]]:
    """Two fake servers that receive weights; the first has two workers."""
    nccl_stand_ins.install(monkeypatch.setattr, nccl_stand_ins.ThreadCommunicator)
    monkeypatch.setattr(nccl, "check_installation", lambda: None)
    fakes[0].workers = 2
    for fake in fakes:
        fake.config["weight_transfer_config"] = {"backend": "nccl"}
    yield fakes
    nccl_stand_ins.ThreadCommunicator.destroy_all()


def start_nccl(fakes: list[FakeServer], folder: Path) -> VLLMServerEngine:
    return start(fakes, folder / "none", weight_transfer="nccl")


def test_weights_reach_every_worker_of_every_server(servers: list[FakeServer], tmp_path: Path) -> None:
    engine = start_nccl(servers, tmp_path)
    for version in (1, 2):
        sync(engine, version)
        check_samples(engine.generate(requests(4), SAMPLING), 4, version)
        assert {fake.label.partition(".")[0][-2:] for fake in servers} == {f"-{version}"}
    for fake in servers:
        assert fake.calls.count("/init_weight_transfer_engine") == 1 and fake.calls.count("/collective_rpc") == 0
        order = [path for path in fake.calls if path not in ("/health", "/v1/models", "/weight_info")]
        first = order.index("/pause")
        assert order[first : first + 7] == [
            *("/pause", "/start_weight_update", "/update_weights", "/finish_weight_update"),
            *("/reset_prefix_cache", "/resume", "/update_weight_version"),
        ]
    engine.close()
    engine.close()
    assert not list(tmp_path.iterdir())


def test_buffers_of_any_size_transfer_the_same_weights(
    servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`shapes` cuts the stream into the same buffers on both sides, in the dtype of the engine."""
    monkeypatch.setattr(nccl, "BUFFER_BYTES", 100)
    sent = {"a": torch.randn(30, 3), "weight": torch.tensor([[4.0]]), "b": torch.randn(7), "c": torch.randn(4, 6).T}
    engine = VLLMServerEngine([fake.url for fake in servers], weight_transfer="nccl")
    engine.check()
    assert engine._servers is not None
    shapes = [(name, tuple(tensor.shape)) for name, tensor in sent.items()]
    transfer = nccl.NCCLTransfer(engine._servers, shapes, torch.bfloat16)
    transfer.publish(iter(sent.items()), 1)
    for fake in servers:
        assert list(fake.received) == list(sent)
        assert all(torch.equal(fake.received[name], tensor.to(torch.bfloat16)) for name, tensor in sent.items())
    transfer.close()


def test_restarted_server_joins_a_new_group_at_the_next_sync(
    servers: list[FakeServer], tmp_path: Path, messages: list[str]
) -> None:
    engine = start_nccl(servers, tmp_path)
    sync(engine, 1)
    servers[0].restart()
    check_samples(engine.generate(requests(6), SAMPLING), 6, 1)  # it holds other weights, and is not asked
    assert servers[0].prompts == [] and len(servers[1].prompts) == 12
    reason = "it does not hold the policy's weights, which it receives at the next sync."
    assert messages == [f"vLLM server {servers[0].url} is not used for now: {reason}"]
    engine.reload_lost_weights()
    assert engine.version is None  # so the same weights are sent again
    sync(engine, 1)
    assert messages[1:] == [f"vLLM server {servers[0].url} is used again."]
    check_samples(engine.generate(requests(6), SAMPLING), 6, 1)
    assert servers[0].prompts and [fake.calls.count("/init_weight_transfer_engine") for fake in servers] == [2, 2]
    engine.reload_lost_weights()
    assert engine.version == 1


def test_group_opens_anew_without_a_lost_server_and_with_it_when_it_is_back(
    servers: list[FakeServer], tmp_path: Path
) -> None:
    engine = start_nccl(servers, tmp_path)
    sync(engine, 1)
    servers[1].down = True
    engine.reload_lost_weights()
    assert engine.version == 1  # a server that is away receives no weights
    sync(engine, 2)
    check_samples(engine.generate(requests(3), SAMPLING), 3, 2)
    servers[1].down = False  # not restarted: it still holds version 1
    check_samples(engine.generate(requests(3), SAMPLING), 3, 2)
    assert servers[1].prompts == [] and servers[1].weight == 1.0
    sync(engine, 3)
    check_samples(engine.generate(requests(3), SAMPLING), 3, 3)
    assert servers[1].prompts
    assert [fake.calls.count("/init_weight_transfer_engine") for fake in servers] == [3, 2]


def test_samples_of_a_server_that_restarts_are_generated_elsewhere(servers: list[FakeServer], tmp_path: Path) -> None:
    engine = start_nccl(servers, tmp_path)
    sync(engine, 1)

    def restart(path: str, number: int) -> None:
        if path == "/v1/completions" and number == 3:
            servers[0].restart()

    servers[0].script = restart
    check_samples(engine.generate(requests(10), SAMPLING), 10, 1)


@pytest.mark.parametrize("path", ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights"])
@pytest.mark.parametrize("failure", [500, ConnectionResetError])
def test_server_lost_during_a_transfer_stops_the_run(
    path: str, failure: Any, servers: list[FakeServer], tmp_path: Path
) -> None:
    engine = start_nccl(servers, tmp_path)
    servers[1].script = answer_with(path, failure)
    read: list[str] = []

    def weights() -> Iterator[tuple[str, Tensor]]:
        yield "weight", torch.ones(1, 1)
        read.append("all")

    with pytest.raises(UserError) as caught:
        engine.sync(weights(), 1)
    reason = "cannot be reached" if failure is ConnectionResetError else "out of memory"
    assert str(caught.value).startswith(f"--data.engine.weight_transfer nccl: vLLM server {servers[1].url} ")
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("restart all vLLM servers and resume with --ckpt_path last.")
    assert read == ["all"]  # as the other ranks, which take part in the all-gather
    with pytest.raises(RuntimeError, match="call sync before generate"):
        engine.generate(requests(1), SAMPLING)


def broken_weights() -> Iterator[tuple[str, Tensor]]:
    raise RuntimeError("the all-gather failed")
    yield


@pytest.mark.parametrize(
    ("weights", "kind", "message"),
    [
        (broken_weights(), RuntimeError, "^the all-gather failed$"),
        ([("other", torch.ones(1))], ValueError, "1 of the policy's weights were not passed to sync, such as weight"),
    ],
    ids=["broken", "missing"],
)
def test_weights_that_raise_end_the_transfer(
    weights: Any, kind: type[Exception], message: str, servers: list[FakeServer], tmp_path: Path
) -> None:
    engine = start_nccl(servers, tmp_path)
    with pytest.raises(kind, match=message):
        engine.sync(weights, 1)
    waiting = [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
    for thread in waiting:  # the request to receive weights was cancelled, or the process could not end
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("transfer", "found"), [(None, "off"), ({"backend": "ipc"}, "ipc")], ids=["without", "other backend"]
)
def test_server_without_the_transfer_raises_before_models_are_loaded(
    transfer: Any, found: str, servers: list[FakeServer]
) -> None:
    servers[1].config["weight_transfer_config"] = transfer
    with pytest.raises(UserError) as caught:
        VLLMServerEngine([fake.url for fake in servers], weight_transfer="nccl").check()
    assert str(caught.value) == (
        f"vLLM server {servers[1].url} has weight transfer {found}, not nccl; start it with --weight-transfer-config "
        '\'{"backend": "nccl"}\', or use --data.engine.weight_transfer folder.'
    )


def test_trainer_without_gpu_or_vllm_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VLLMServerEngine(["http://127.0.0.1:9"], weight_transfer="nccl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    use_folder = r": .*, or use --data.engine.weight_transfer folder\.$"
    with pytest.raises(UserError, match=f"weight_transfer nccl needs an NVIDIA GPU .*{use_folder}"):
        engine.check()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else object())
    with pytest.raises(
        UserError, match=f"weight_transfer nccl needs vLLM .* not installed: pip install vllm{use_folder[4:]}"
    ):
        engine.check()


def test_adapters_are_refused_unless_merged(servers: list[FakeServer]) -> None:
    urls = [fake.url for fake in servers]
    with pytest.raises(
        UserError, match="weight_transfer is nccl, .*: set serve to merged, or weight_transfer to folder"
    ):
        VLLMServerEngine(urls, weight_transfer="nccl").check_adapter(LORA)
    VLLMServerEngine(urls, weight_transfer="nccl", serve="merged").check_adapter(LORA)
