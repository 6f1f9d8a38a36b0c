"""VLLMServerEngine on healthy fake servers: load balancing, adapters, prefix cache and close."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from fake_server import LORA, SAMPLING, FakeServer, answer_with, check_samples, requests, start, sync

from rlmt.types import AdapterWeights


def test_requests_go_to_the_free_server_and_groups_stay_together(fakes: list[FakeServer], tmp_path: Path) -> None:
    fast, slow = fakes

    def wait(path: str, number: int) -> None:
        while path == "/v1/completions" and len(fast.prompts) < 30:
            time.sleep(0.01)

    slow.script = wait  # until the other server has answered 30 of 40 samples
    engine = start(fakes, tmp_path, max_in_flight=4)
    sync(engine, 3)
    check_samples(engine.generate(requests(20), SAMPLING), 20, 3)
    assert 4 <= len(slow.prompts) <= 10 and len(fast.prompts) + len(slow.prompts) == 40
    assert max(fast.max_outstanding, slow.max_outstanding) <= 4
    assert sorted(slow.requested[:4]) == [1, 1, 3, 3]  # whole groups alternate between the servers
    engine.close()
    assert not list(tmp_path.iterdir())


def test_adapters_replace_each_other_and_the_base_is_loaded_once(fakes: list[FakeServer], tmp_path: Path) -> None:
    engine = start(fakes, tmp_path)
    fakes[0].adapters = ["rlmt-killed-17", "someone-elses"]
    for version in (1, 2, 3):
        adapter = AdapterWeights(dict(LORA), {"base_model.model.lora_A.weight": torch.ones(1) * version})
        engine.sync([("weight", torch.tensor([5.0]))], version, adapter)
        samples = engine.generate(requests(4), SAMPLING)
        assert samples.weight_version == version and {row[0] for row in samples.logprobs} == {5.0}
        assert [len(fake.adapters) for fake in fakes] == [2, 1]
        assert len(list(tmp_path.rglob("adapter_model.safetensors"))) == 1
    assert [fake.calls.count("/collective_rpc") for fake in fakes] == [1, 1]
    assert [fake.calls.count("/reset_prefix_cache") for fake in fakes] == [3, 3]


def test_reset_of_a_busy_prefix_cache_is_retried(fakes: list[FakeServer], tmp_path: Path) -> None:
    engine = start(fakes, tmp_path)
    fakes[0].script = lambda path, number: {"success": number > 2} if path == "/reset_prefix_cache" else None
    sync(engine, 1)
    assert fakes[0].calls.count("/reset_prefix_cache") == 3


def test_rejected_request_raises_without_retry(fakes: list[FakeServer], tmp_path: Path) -> None:
    engine = start(fakes, tmp_path)
    sync(engine, 1)
    fakes[0].script = fakes[1].script = answer_with("/v1/completions", 400)
    with pytest.raises(RuntimeError, match=r"rejected a request: .*out of memory.*\.$"):
        engine.generate(requests(4), SAMPLING)


def test_close_cancels_generate_in_another_thread(fakes: list[FakeServer], tmp_path: Path) -> None:
    engine = start(fakes, tmp_path)
    sync(engine, 1)
    fakes[0].delay = fakes[1].delay = 30
    errors: list[BaseException] = []

    def generate() -> None:
        try:
            engine.generate(requests(4), SAMPLING)
        except BaseException as error:  # noqa: B036
            errors.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    while not fakes[0].outstanding:
        time.sleep(0.01)
    engine.close()
    thread.join(10)
    assert not thread.is_alive() and len(errors) == 1
    for _ in range(2):
        engine.close()
    with pytest.raises(RuntimeError, match="call start first"):
        engine.generate(requests(1), SAMPLING)
