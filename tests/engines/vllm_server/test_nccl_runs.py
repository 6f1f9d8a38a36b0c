"""Weights sync to real vLLM servers by their weight transfer, with gloo in place of NCCL; the last test kills one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import nccl_stand_ins
import pytest
import torch
from real_server import (
    KEY,
    SGD,
    RealServer,
    documented_commands,
    fit,
    load_policy,
    make_requests,
    start,
    sync,
    train,
    two_servers,
)

from rlmt.engines.vllm_server import nccl
from rlmt.errors import UserError
from rlmt.models import LoRA
from rlmt.types import Sampling

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(1800),
]
SAMPLING = Sampling(0.7, 40)


@pytest.fixture(scope="module")
def servers(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RealServer]]:
    """The documented servers for a CPU, with the documented option for NCCL."""
    plugin = nccl_stand_ins.plugin_folder(tmp_path_factory.mktemp("plugin") / "plugin")
    commands = documented_commands("VLLM_SERVER_DEV_MODE")
    (option,) = [words[-2:] for words in commands if "--weight-transfer-config" in words]
    with two_servers(tiny, tmp_path_factory.mktemp("servers"), [f"PYTHONPATH={plugin}"], option) as started:
        yield started


@pytest.fixture(autouse=True)
def gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo in place of NCCL in this process, too."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setattr(nccl, "check_installation", lambda: None)
    monkeypatch.setattr(nccl, "BUFFER_BYTES", 100_000)  # several buffers, some with one tensor and some with many
    nccl_stand_ins.install(monkeypatch.setattr)


def test_logprobs_after_each_transfer_equal_the_policys(
    servers: list[RealServer], tiny: Path, helpers: Any, tmp_path: Path
) -> None:
    model, urls = load_policy(tiny), [server.url for server in servers]
    engine = start(urls, model, tiny, tmp_path, weight_transfer="nccl", max_in_flight=4)
    requests = make_requests(helpers)
    state = torch.get_rng_state()
    before = [server.log.read_text().count("POST /v1/completions") for server in servers]
    for version in (5, 6):
        sync(engine, model, version)
        samples = engine.generate(requests, SAMPLING)
        assert samples.weight_version == engine.version == version
        assert helpers.mismatch(model, requests, samples, 0.7) < 1e-3
        train(model)
        assert helpers.mismatch(model, requests, samples, 0.7) > 1e-2  # the cached prefixes are stale from here on
    assert torch.equal(torch.get_rng_state(), state)
    for server, count in zip(servers, before, strict=True):
        log = server.log.read_text()
        assert log.count("POST /v1/completions") >= count + 3  # each server generated some of them
        assert log.count("POST /init_weight_transfer_engine") == 1 and "POST /collective_rpc" not in log
    engine.close()
    assert not list(tmp_path.iterdir())


def test_merged_adapter_is_transferred(servers: list[RealServer], tiny: Path, helpers: Any, tmp_path: Path) -> None:
    model, urls = load_policy(tiny), [server.url for server in servers]
    LoRA(rank=8, alpha=16).add_to(model)
    engine = start(urls, model, tiny, tmp_path, weight_transfer="nccl", serve="merged")
    requests = make_requests(helpers, 4)
    for version in (1, 2):
        sync(engine, model, version)
        assert helpers.mismatch(model, requests, engine.generate(requests, SAMPLING), 0.7) < 1e-3
        train(model)
    engine.close()


def test_run_equals_one_through_the_shared_folder(
    servers: list[RealServer], tiny: Path, prompts_file: Path, tmp_path: Path
) -> None:
    runs = [
        fit(servers, tiny, prompts_file, tmp_path / name, *SGD, "--trainer.max_steps", 3, *option)
        for name, option in (("folder", ()), ("nccl", ("--data.engine.weight_transfer", "nccl")))
    ]
    for one, other in zip(*runs, strict=True):
        for name in ("reward/mean", "engine/weight_lag", "policy/loss", "policy/grad_norm", "length/response_mean"):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-3, abs=1e-5), name
    assert not (tmp_path / "nccl/weights").exists()


def test_restarted_server_receives_weights_at_the_next_sync_and_a_killed_one_stops_it(
    servers: list[RealServer], tiny: Path, helpers: Any, tmp_path: Path
) -> None:
    model, urls = load_policy(tiny), [server.url for server in servers]
    engine = start(urls, model, tiny, tmp_path, weight_transfer="nccl", max_in_flight=4)
    requests = make_requests(helpers)
    sync(engine, model, 1)
    servers[0].kill()
    servers[0].start()
    servers[0].wait()
    samples = engine.generate(requests, SAMPLING)
    assert helpers.mismatch(model, requests, samples, 0.7) < 1e-3
    assert httpx.get(f"{urls[0]}/weight_info").json() == {"weight_version": "default"}  # so it was not used
    train(model)
    sync(engine, model, 2)
    assert helpers.mismatch(model, requests, engine.generate(requests, SAMPLING), 0.7) < 1e-3
    labels = {httpx.get(f"{url}/weight_info").json()["weight_version"].partition(".")[0][-2:] for url in urls}
    assert labels == {"-2"}

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for number, item in enumerate(model.state_dict().items()):
            if number == 5:
                servers[1].kill()
            yield item

    with pytest.raises(UserError, match=f"{urls[1]} .*: restart all vLLM servers and resume with --ckpt_path last"):
        engine.sync(weights(), 3)
    engine.close()
