"""Real vLLM servers, started with the commands of docs/rollout-servers.md; the last two tests kill them."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from real_server import (
    KEY,
    SGD,
    Proxy,
    RealServer,
    fit,
    fit_arguments,
    free_port,
    launch_two_ranks,
    load_policy,
    make_requests,
    metrics,
    same_samples,
    start,
    sync,
    train,
    two_servers,
)

from rlmt.cli.commands import main
from rlmt.engines import VLLMServerEngine
from rlmt.errors import UserError
from rlmt.models import LoRA, loading
from rlmt.models.adapters import adapter_weights, base_tensors
from rlmt.types import FinishReason, SampleRequest, Samples, Sampling

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(1800),  # for six processes that import vLLM on a busy machine
]


@pytest.fixture(scope="module")
def servers(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RealServer]]:
    with two_servers(tiny, tmp_path_factory.mktemp("servers")) as started:
        yield started


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)


def test_logprobs_after_sync_equal_the_policys(
    servers: list[RealServer], tiny: Path, helpers: Any, tmp_path: Path
) -> None:
    model, urls = load_policy(tiny), [server.url for server in servers]
    both = start(urls, model, tiny, tmp_path / "both")
    requests = make_requests(helpers)
    with pytest.raises(RuntimeError, match="call sync before generate"):
        both.generate(requests, Sampling(0.7, 40))
    state = torch.get_rng_state()
    for version in (5, 6):
        sync(both, model, version)
        samples = both.generate(requests, Sampling(0.7, 40))
        assert samples.weight_version == both.version == version
        assert helpers.mismatch(model, requests, samples, 0.7) < 1e-3
        train(model)
        assert helpers.mismatch(model, requests, samples, 0.7) > 1e-2  # the cached prefixes are stale from here on
    assert torch.equal(torch.get_rng_state(), state)
    assert len(list((tmp_path / "both").rglob("*.safetensors"))) == 1  # only the newest weights
    names = dict(model.named_parameters())
    names.popitem()
    with pytest.raises(ValueError, match="policy's weights were not passed to sync"):
        both.sync(names.items(), 7)
    both.close()
    both.close()
    assert not list((tmp_path / "both").iterdir())


@pytest.mark.slow
def test_stops_and_samples_do_not_depend_on_the_server(
    servers: list[RealServer], tiny: Path, helpers: Any, tmp_path: Path
) -> None:
    model, urls = load_policy(tiny), [server.url for server in servers]
    requests, sampling = make_requests(helpers, 5, 200), Sampling(0.9, 60)
    both = start(urls, model, tiny, tmp_path / "both", max_in_flight=4)
    sync(both, model, 1)
    free = both.generate(requests, sampling)
    assert [len(ids) for ids in free.completion_ids] == [60] * 15 and set(free.finish) == {FinishReason.LENGTH}
    for log in (server.log for server in servers):  # each server generated some of them
        assert log.read_text().count("POST /v1/completions") >= 3
    token = free.completion_ids[0][7]
    cut = both.generate(requests[:1], Sampling(0.9, 60, stop_token_ids=(token,)))
    assert cut.completion_ids[0] == free.completion_ids[0][: free.completion_ids[0].index(token) + 1]
    assert cut.finish[0] is FinishReason.STOP
    text = loading.load_tokenizer(tiny / "policy").decode(free.completion_ids[1])
    stop = re.sub(r"[^ -~]", " ", text).split()[2][:2]
    cut = both.generate(requests[:1], Sampling(0.9, 60, stop=(stop,)))
    assert cut.completion_ids[1] == free.completion_ids[1][: len(cut.completion_ids[1])]
    assert cut.finish[1] is FinishReason.STOP
    long = [SampleRequest([5] * 509, [0])]
    assert [len(ids) for ids in both.generate(long, sampling).completion_ids] == [3]
    with pytest.raises(UserError, match="512 tokens leaves no room"):
        both.generate([SampleRequest([5] * 512, [0])], sampling)
    both.close()
    alone = start(urls[1:], model, tiny, tmp_path / "alone")
    sync(alone, model, 1)
    assert same_samples(alone.generate(requests[::-1], sampling), reverse_groups(free))
    alone.close()


def reverse_groups(samples: Samples) -> Samples:
    """The samples with their groups of three in reverse order."""
    order = [3 * group + k for group in reversed(range(len(samples.finish) // 3)) for k in range(3)]
    ids, logprobs, finish = samples.completion_ids, samples.logprobs, samples.finish
    return Samples([ids[i] for i in order], [logprobs[i] for i in order], [finish[i] for i in order], 0)


@pytest.mark.slow
def test_base_is_read_once_and_adapters_at_each_sync(
    servers: list[RealServer], tiny: Path, helpers: Any, tmp_path: Path
) -> None:
    model, urls = load_policy(tiny), [server.url for server in servers]
    LoRA(rank=8, alpha=16).add_to(model)
    engine, requests = start(urls, model, tiny, tmp_path / "shared"), make_requests(helpers, 4)
    config = adapter_weights(model)
    assert config is not None
    engine.check_adapter(config.config)
    with pytest.raises(UserError, match=r"up to rank 16; start it with --enable-lora --max-lora-rank 64"):
        engine.check_adapter(config.config | {"r": 64})
    reads = 0

    def base() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal reads
        reads += 1
        yield from base_tensors(model).items()

    for version in range(1, 4):
        engine.sync(base(), version, adapter_weights(model))
        samples = engine.generate(requests, Sampling(0.7, 24))
        assert helpers.mismatch(model, requests, samples, 0.7) < 1e-3
        train(model)
        assert helpers.mismatch(model, requests, samples, 0.7) > 1e-2
    assert reads == 1
    models = httpx.get(f"{urls[0]}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).json()["data"]
    assert len(models) == 2  # the base and one adapter
    engine.close()
    merged = start(urls, model, tiny, tmp_path / "shared", serve="merged")
    sync(merged, model, 9)
    assert helpers.mismatch(model, requests, merged.generate(requests, Sampling(0.7, 24)), 0.7) < 1e-3
    merged.close()


def test_unsuitable_servers_raise_one_line_errors(
    servers: list[RealServer], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = servers[0].url
    closed = f"http://127.0.0.1:{free_port()}"
    cases = [
        ({"urls": [url], "model": "llama"}, f"{url} serves runs/tiny/policy, not llama; set --data.engine.model to"),
        ({"urls": [url, closed]}, f"{closed} cannot be reached"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            VLLMServerEngine(**options).check()  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    for value, message in (("wrong", "rejects the API key of"), (None, "requires an API key, but none is set in")):
        monkeypatch.setenv("VLLM_API_KEY", value) if value else monkeypatch.delenv("VLLM_API_KEY")
        with pytest.raises(UserError, match=f"{message} the environment variable VLLM_API_KEY; set it to") as caught:
            VLLMServerEngine([url]).check()
        assert "wrong" not in str(caught.value)


@pytest.mark.slow
def test_one_step_off_policy_run_resumes_exactly(
    servers: list[RealServer], tiny: Path, prompts_file: Path, tmp_path: Path
) -> None:
    uninterrupted = fit(servers, tiny, prompts_file, tmp_path / "uninterrupted", "--trainer.max_steps", 4)
    assert [float(row["engine/weight_version"]) for row in uninterrupted] == [0, 0, 1, 2]
    assert [float(row["engine/weight_lag"]) for row in uninterrupted] == [0, 1, 1, 1]
    assert float(uninterrupted[0]["engine/mismatch_max"]) < 1e-3  # the first step is on-policy
    assert [row["engine/importance_mean"] == "" for row in uninterrupted] == [True] + [False] * 3
    # For samples from π_old the mean of π / π_old is 1, and one small step changes it little.
    assert all(abs(float(row["engine/importance_mean"]) - 1) < 0.05 for row in uninterrupted[1:])
    fit(servers, tiny, prompts_file, tmp_path / "resumed", "--trainer.max_steps", 2)
    resumed = fit(servers, tiny, prompts_file, tmp_path / "resumed", "--trainer.max_steps", 4, "--ckpt_path", "last")
    for one, other in zip(resumed, uninterrupted, strict=True):
        for name in ("reward/mean", "engine/weight_lag", "policy/loss", "policy/grad_norm"):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-3, abs=1e-5), name
    saved = (tmp_path / "uninterrupted/version_0/config.yaml").read_text()
    assert "VLLM_API_KEY" in saved
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_one_and_two_ranks_resume_each_others_runs(
    crash: Any, servers: list[RealServer], tiny: Path, prompts_file: Path, tmp_path: Path, no_plots: None
) -> None:
    def train(run: str, steps: int, strategy: str | None, *more: str) -> list[dict[str, str]]:
        if strategy is None:
            return fit(servers, tiny, prompts_file, tmp_path / run, *SGD, "--trainer.max_steps", steps, *more)
        log = tmp_path / f"{run}.log"
        arguments = fit_arguments(
            servers, tiny, prompts_file, tmp_path / run, *SGD, "--trainer.max_steps", steps, *more
        )
        crash.finish(launch_two_ranks(crash, arguments, strategy, log), log)
        return metrics(tmp_path / run)

    alone = train("alone", 3, None)
    train("from two", 2, "fsdp")
    train("from one", 2, None)
    for run, strategy in (("from two", None), ("from one", "ddp")):
        pending = torch.load(tmp_path / run / "latest/checkpoints/last.ckpt", weights_only=True)["RolloutDataModule"][
            "ahead"
        ]
        assert len(pending["prompts"]) == 4 and len(pending["lengths"]) == 16
        rows = train(run, 3, strategy, "--ckpt_path", "last")
        assert float(rows[0]["engine/mismatch_max"]) < 1e-3
        for one, other in zip(rows, alone, strict=True):
            for name in ("reward/mean", "engine/weight_lag", "policy/loss", "policy/grad_norm", "length/response_mean"):
                assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-3, abs=1e-5), (run, name)
    assert not list((tmp_path / "from two/weights").iterdir())


@pytest.mark.slow
def test_two_ranks_continue_on_one_server_and_stop_without_any(
    crash: Any, servers: list[RealServer], tiny: Path, prompts_file: Path, tmp_path: Path
) -> None:
    proxies, log, run = [Proxy(server.url) for server in servers], tmp_path / "log.txt", tmp_path / "run"
    arguments = fit_arguments(proxies, tiny, prompts_file, run, "--data.rollout_lag", 0, "--trainer.max_steps", 1000)
    process = launch_two_ranks(crash, arguments, "fsdp", log)
    crash.wait_for_steps(process, run, 1)
    proxies[0].close()
    crash.wait_for_steps(process, run, 3)
    assert process.poll() is None, log.read_text()
    proxies[1].close()
    assert crash.wait(process) == 2
    lines = log.read_text().splitlines()
    (error,) = [line for line in lines if "rlmt: error:" in line]
    expected = (
        r"--data.engine.urls: no vLLM server is usable \(.*\); start the servers and resume with --ckpt_path last\."
    )
    assert re.fullmatch(f"rlmt: error: {expected}", error) and all(proxy.url in error for proxy in proxies)
    assert len(re.findall(r"vLLM server http\S+ is not used for now", log.read_text())) == 2
    (saved,) = [int(line) for line in re.findall(r"has the first (\d+) steps", log.read_text())]
    assert torch.load(run / "latest/checkpoints/last.ckpt", weights_only=True)["global_step"] == saved >= 3
    assert not list((run / "weights").iterdir())


def test_requests_of_a_killed_server_go_to_the_other(
    servers: list[RealServer], tiny: Path, helpers: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Runs second to last, since it kills the first server."""
    model, urls = load_policy(tiny), [server.url for server in servers]
    engine = start(urls, model, tiny, tmp_path / "shared")
    sync(engine, model, 1)
    requests, sampling = make_requests(helpers, 6, 40, 2), Sampling(0.9, 150)
    expected = engine.generate(requests, sampling)

    async def generate_and_kill(server: RealServer) -> Samples:
        generation = asyncio.create_task(asyncio.to_thread(engine.generate, requests, sampling))
        async with httpx.AsyncClient(base_url=server.url) as http:
            while not re.search(
                r"^vllm:num_requests_running\S* [1-9]", (await http.get("/metrics")).text, re.MULTILINE
            ):
                await asyncio.sleep(0.01)
        server.kill()
        assert not generation.done()
        return await generation

    again = asyncio.run(generate_and_kill(servers[0]))
    assert same_samples(again, expected)
    (warning,) = [str(each.message) for each in recwarn if "vLLM server" in str(each.message)]
    assert f"{servers[0].url} is not used for now: it cannot be reached" in warning
    alone = engine.generate(requests[:1], sampling)
    assert alone.completion_ids == expected.completion_ids[:2]
    engine.close()


def test_run_without_servers_stops_and_resumes_only_with_servers(
    servers: list[RealServer], tiny: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, last = servers[1], tmp_path / "latest/checkpoints/last.ckpt"

    def kill() -> None:
        while not last.exists():
            time.sleep(0.05)
        server.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    every_step = "[{class_path: rlmt.callbacks.PolicyCheckpoint, init_args: {every_n_steps: 1}}]"
    assert main(fit_arguments([server], tiny, prompts_file, tmp_path, "--trainer.callbacks", every_step)) == 2
    killer.join()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error:")]
    assert re.search(
        rf"no vLLM server is usable \({server.url} .*\); start the servers and resume with --ckpt_path last\.$", line
    )
    assert torch.load(last, weights_only=True)["global_step"] >= 1
    assert not list((tmp_path / "weights").iterdir())
    assert main(fit_arguments([server], tiny, prompts_file, tmp_path, "--ckpt_path", "last")) == 2
    assert f"rlmt: error: vLLM server {server.url} cannot be reached" in capsys.readouterr().err
