"""Real vLLM servers, started with the commands of docs/rollout-servers.md; the last two tests kill them."""

from __future__ import annotations

import asyncio
import csv
import importlib.util
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import PreTrainedModel

from rlmt.cli.commands import main
from rlmt.engines import VLLMServerEngine
from rlmt.errors import UserError
from rlmt.models import LoRA, loading
from rlmt.models.adapters import adapter_weights, base_tensors, trainable_parameters
from rlmt.types import FinishReason, SampleRequest, Samples, Sampling

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(1800),  # of six processes that each import vLLM, where the machine is busy with other things
]

DOCS = Path(__file__).parents[3] / "docs" / "rollout-servers.md"
KEY = "open-sesame-3141"


def commands(start: str) -> list[list[str]]:
    """Words of each command in the documentation that begins so."""
    blocks = re.findall(r"```sh\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(start)]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class RealServer:
    """A server as the documentation starts it, on a port that is free."""

    def __init__(self, command: list[str], folder: Path) -> None:
        first = command.index("python")
        env = dict(word.split("=", 1) for word in command[:first])
        words = [sys.executable, *command[first + 1 :]]
        port = free_port()
        words[words.index("--port") + 1] = str(port)
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"{port}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                words,
                env=os.environ | env | {"VLLM_API_KEY": KEY},
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that all of its processes can be ended together
            )

    def wait(self) -> None:
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.3)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def servers(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RealServer]]:
    folder = tmp_path_factory.mktemp("servers")
    (folder / "runs").mkdir()
    (folder / "runs/tiny").symlink_to(tiny)
    found = [RealServer(words, folder) for words in commands("VLLM_SERVER_DEV_MODE") if "runs/tiny/policy" in words]
    try:
        assert len(found) == 2
        for server in found:
            server.wait()
        yield found
    finally:
        for server in found:
            if server.process.poll() is None:
                server.kill()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)


def policy(tiny: Path) -> PreTrainedModel:
    return loading.load_policy(tiny / "policy", "float32").train()


def started(urls: list[str], model: PreTrainedModel, tiny: Path, shared: Path, **options: Any) -> VLLMServerEngine:
    engine = VLLMServerEngine(urls, str(shared), **options)
    engine.check()
    tokenizer = loading.load_tokenizer(tiny / "policy")
    engine.start(model, tokenizer, 512, torch.float32)
    return engine


def sync(engine: VLLMServerEngine, model: PreTrainedModel, version: int) -> None:
    engine.sync(iter(base_tensors(model).items()), version, adapter_weights(model))


def train(model: PreTrainedModel) -> None:
    ids = torch.arange(40)[None] % 300
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.02)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def requests(helpers: Any, count: int = 6, length: int = 70, samples: int = 3) -> list[SampleRequest]:
    return [
        SampleRequest(prompt, [2**63 - 1 - 10 * i - k for k in range(samples)])
        for i, prompt in enumerate(helpers.prompts(count, length))
    ]


def same(one: Samples, other: Samples) -> bool:
    worst = max(
        abs(a - b) for x, y in zip(one.logprobs, other.logprobs, strict=True) for a, b in zip(x, y, strict=True)
    )
    return one.completion_ids == other.completion_ids and one.finish == other.finish and worst < 1e-4


def test_after_every_sync_the_servers_are_the_policy(
    servers: list[RealServer], tiny: Path, helpers: Any, tmp_path: Path
) -> None:
    model, urls = policy(tiny), [server.url for server in servers]
    both = started(urls, model, tiny, tmp_path / "both")
    asked = requests(helpers)
    with pytest.raises(RuntimeError, match="sync before"):
        both.generate(asked, Sampling(0.7, 40))
    state = torch.get_rng_state()
    for version in (5, 6):
        sync(both, model, version)
        samples = both.generate(asked, Sampling(0.7, 40))
        assert samples.weight_version == both.version == version
        assert helpers.mismatch(model, asked, samples, 0.7) < 1e-3
        train(model)
        assert helpers.mismatch(model, asked, samples, 0.7) > 1e-2  # the cached prompts are stale from here on
    assert torch.equal(torch.get_rng_state(), state)
    assert len(list((tmp_path / "both").rglob("*.safetensors"))) == 1  # of the newest weights alone
    names = dict(model.named_parameters())
    names.popitem()
    with pytest.raises(ValueError, match="policy's weights were not passed to sync"):
        both.sync(names.items(), 7)
    both.close()
    both.close()
    assert not list((tmp_path / "both").iterdir())


def test_samples_end_where_they_should_whichever_server_draws_them(
    servers: list[RealServer], tiny: Path, helpers: Any, tmp_path: Path
) -> None:
    model, urls = policy(tiny), [server.url for server in servers]
    asked, sampling = requests(helpers, 5, 200), Sampling(0.9, 60)
    both = started(urls, model, tiny, tmp_path / "both", max_in_flight=4)
    sync(both, model, 1)
    free = both.generate(asked, sampling)
    assert [len(ids) for ids in free.completion_ids] == [60] * 15 and set(free.finish) == {FinishReason.LENGTH}
    for log in (server.log for server in servers):  # each drew some of them
        assert log.read_text().count("POST /v1/completions") >= 3
    token = free.completion_ids[0][7]
    cut = both.generate(asked[:1], Sampling(0.9, 60, stop_token_ids=(token,)))
    assert cut.completion_ids[0] == free.completion_ids[0][: free.completion_ids[0].index(token) + 1]
    assert cut.finish[0] is FinishReason.STOP
    text = loading.load_tokenizer(tiny / "policy").decode(free.completion_ids[1])
    stop = re.sub(r"[^ -~]", " ", text).split()[2][:2]
    cut = both.generate(asked[:1], Sampling(0.9, 60, stop=(stop,)))
    assert cut.completion_ids[1] == free.completion_ids[1][: len(cut.completion_ids[1])]
    assert cut.finish[1] is FinishReason.STOP
    long = [SampleRequest([5] * 509, [0])]
    assert [len(ids) for ids in both.generate(long, sampling).completion_ids] == [3]
    with pytest.raises(UserError, match="512 tokens leaves no room"):
        both.generate([SampleRequest([5] * 512, [0])], sampling)
    both.close()
    alone = started(urls[1:], model, tiny, tmp_path / "alone")
    sync(alone, model, 1)
    assert same(alone.generate(asked[::-1], sampling), both_backwards(free))
    alone.close()


def both_backwards(samples: Samples) -> Samples:
    """Groups of three in the opposite order."""
    order = [3 * group + k for group in reversed(range(len(samples.finish) // 3)) for k in range(3)]
    ids, logprobs, finish = samples.completion_ids, samples.logprobs, samples.finish
    return Samples([ids[i] for i in order], [logprobs[i] for i in order], [finish[i] for i in order], 0)


def test_adapters_go_alone_once_the_base_is_there(
    servers: list[RealServer], tiny: Path, helpers: Any, tmp_path: Path
) -> None:
    model, urls = policy(tiny), [server.url for server in servers]
    LoRA(rank=8, alpha=16).add_to(model)
    engine, asked = started(urls, model, tiny, tmp_path / "shared"), requests(helpers, 4)
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
        samples = engine.generate(asked, Sampling(0.7, 24))
        assert helpers.mismatch(model, asked, samples, 0.7) < 1e-3
        train(model)
        assert helpers.mismatch(model, asked, samples, 0.7) > 1e-2
    assert reads == 1
    models = httpx.get(f"{urls[0]}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).json()["data"]
    assert len(models) == 2  # the base and one adapter
    engine.close()
    merged = started(urls, model, tiny, tmp_path / "shared", serve="merged")
    sync(merged, model, 9)
    assert helpers.mismatch(model, asked, merged.generate(asked, Sampling(0.7, 24)), 0.7) < 1e-3
    merged.close()


def test_a_server_that_is_not_what_the_run_needs_is_told_in_one_line(
    servers: list[RealServer], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = servers[0].url
    closed = f"http://127.0.0.1:{free_port()}"
    cases = [
        ({"urls": [url], "model": "llama"}, f"{url} serves runs/tiny/policy, not llama; set --data.engine.model to"),
        ({"urls": [url, closed]}, f"{closed} cannot be reached"),
    ]
    for options, says in cases:
        with pytest.raises(UserError, match=re.escape(says)) as caught:
            VLLMServerEngine(**options).check()  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    for value, says in (("wrong", "refuses the API key in"), (None, "wants an API key, and there is none in")):
        monkeypatch.setenv("VLLM_API_KEY", value) if value else monkeypatch.delenv("VLLM_API_KEY")
        with pytest.raises(UserError, match=f"{says} the environment variable VLLM_API_KEY; set it to") as caught:
            VLLMServerEngine([url]).check()
        assert "wrong" not in str(caught.value)


def fit_words(servers: list[RealServer], tiny: Path, prompts: Path, run: Path, *more: object) -> list[str]:
    """The documentation's command, on smaller batches."""
    command = next(words for words in commands("rlmt fit") if "lora" not in words and "--data.rollout_lag" in words)
    options: dict[str, object] = {
        "--model.policy": tiny / "policy",
        "--model.reward.model": tiny / "reward",
        "--data.prompts": prompts,
        "--data.engine.urls": "[" + ",".join(server.url for server in servers) + "]",
        "--data.engine.shared_folder": run / "weights",
        "--data.batch_size": 4,
        "--data.group_size": 4,
        "--data.max_prompt_tokens": 256,
        "--data.max_new_tokens": 32,
        "--data.val_size": 0,
        "--trainer.default_root_dir": run,
        "--trainer.enable_progress_bar": "false",
    }
    return [*command[1:], *(str(word) for pair in options.items() for word in pair), *map(str, more)]


def fit(servers: list[RealServer], tiny: Path, prompts: Path, run: Path, *more: object) -> list[dict[str, str]]:
    """Trains; returns the metrics of all steps of the run so far."""
    assert main(fit_words(servers, tiny, prompts, run, *more)) == 0
    return metrics(run)


def metrics(run: Path) -> list[dict[str, str]]:
    rows: dict[int, dict[str, str]] = {}
    for path in sorted(run.glob("version_*/metrics.csv")):
        with path.open() as file:
            rows |= {int(row["step"]): row for row in csv.DictReader(file) if row["reward/mean"]}
    return [rows[step] for step in sorted(rows)]


def test_a_run_one_step_ahead_of_real_servers_resumes_exactly(
    servers: list[RealServer], tiny: Path, prompts_file: Path, tmp_path: Path
) -> None:
    whole = fit(servers, tiny, prompts_file, tmp_path / "whole", "--trainer.max_steps", 4)
    assert [float(row["engine/weight_version"]) for row in whole] == [0, 0, 1, 2]
    assert [float(row["engine/weight_lag"]) for row in whole] == [0, 1, 1, 1]
    assert float(whole[0]["engine/mismatch_max"]) < 1e-3  # on-policy still
    assert [row["engine/importance_mean"] == "" for row in whole] == [True] + [False] * 3
    # Of samples from π_old the mean of π / π_old is 1, and a step of this size moves it little.
    assert all(abs(float(row["engine/importance_mean"]) - 1) < 0.05 for row in whole[1:])
    fit(servers, tiny, prompts_file, tmp_path / "part", "--trainer.max_steps", 2)
    part = fit(servers, tiny, prompts_file, tmp_path / "part", "--trainer.max_steps", 4, "--ckpt_path", "last")
    for one, other in zip(part, whole, strict=True):
        for name in ("reward/mean", "engine/weight_lag", "policy/loss", "policy/grad_norm"):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-3, abs=1e-5), name
    saved = (tmp_path / "whole/version_0/config.yaml").read_text()
    assert "VLLM_API_KEY" in saved
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes(), file


SGD = (  # rounding errors in small gradients do not sway it
    *("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.3", "--model.optimizer.momentum", "0.9"),
)


def launch_two(crash: Any, words: list[str], config: str, log: Path) -> Any:
    """Starts the same run on two ranks."""
    spread = ["--config", config, "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    return crash.launch([*words, *spread], log, ranks=2, VLLM_API_KEY=KEY)


def test_two_ranks_are_one_and_go_on_from_each_others_batch(
    crash: Any, servers: list[RealServer], tiny: Path, prompts_file: Path, tmp_path: Path, no_pictures: None
) -> None:
    def train(run: str, steps: int, spread: str | None, *more: str) -> list[dict[str, str]]:
        if spread is None:
            return fit(servers, tiny, prompts_file, tmp_path / run, *SGD, "--trainer.max_steps", steps, *more)
        log = tmp_path / f"{run}.log"
        words = fit_words(servers, tiny, prompts_file, tmp_path / run, *SGD, "--trainer.max_steps", steps, *more)
        crash.finish(launch_two(crash, words, spread, log), log)
        return metrics(tmp_path / run)

    alone = train("alone", 3, None)
    train("from two", 2, "fsdp")
    train("from one", 2, None)
    for run, spread in (("from two", None), ("from one", "ddp")):
        under_way = torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True)["RolloutDataModule"][
            "ahead"
        ]
        assert len(under_way["prompts"]) == 4 and len(under_way["lengths"]) == 16
        rows = train(run, 3, spread, "--ckpt_path", "last")
        assert float(rows[0]["engine/mismatch_max"]) < 1e-3
        for one, other in zip(rows, alone, strict=True):
            for name in ("reward/mean", "engine/weight_lag", "policy/loss", "policy/grad_norm", "length/response_mean"):
                assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-3, abs=1e-5), (run, name)
    assert not list((tmp_path / "from two/weights").iterdir())


class Gate:
    """A way to a server that can be shut."""

    def __init__(self, url: str) -> None:
        self.to = ("127.0.0.1", int(url.rpartition(":")[2]))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.sockets = [self.listener]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                pair = [self.listener.accept()[0], socket.create_connection(self.to)]
                self.sockets += pair
                for ends in (pair, pair[::-1]):
                    threading.Thread(target=self.pass_on, args=ends, daemon=True).start()

    def pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def shut(self) -> None:
        for one in self.sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def test_two_ranks_go_on_with_one_server_and_stop_together_without(
    crash: Any, servers: list[RealServer], tiny: Path, prompts_file: Path, tmp_path: Path
) -> None:
    gates, log, run = [Gate(server.url) for server in servers], tmp_path / "log.txt", tmp_path / "run"
    words = fit_words(gates, tiny, prompts_file, run, "--data.rollout_lag", 0, "--trainer.max_steps", 1000)  # type: ignore[arg-type]
    process = launch_two(crash, words, "fsdp", log)
    crash.wait_for_steps(process, run, 1)
    gates[0].shut()
    crash.wait_for_steps(process, run, 3)
    assert process.poll() is None, log.read_text()
    gates[1].shut()
    assert crash.wait(process) == 2
    lines = log.read_text().splitlines()
    (error,) = [line for line in lines if "rlmt: error:" in line]
    told = r"no vLLM server can be used \(.*\); start them and go on with --ckpt_path last"
    assert re.fullmatch(f"rlmt: error: {told}", error) and all(gate.url in error for gate in gates)
    assert len(re.findall(r"vLLM server http\S+ is not used for now", log.read_text())) == 2
    (saved,) = [int(line) for line in re.findall(r"holds all up to step (\d+)", log.read_text())]
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == saved + 1 >= 3
    assert not list((run / "weights").iterdir())


def test_a_killed_servers_requests_go_to_the_other(
    servers: list[RealServer], tiny: Path, helpers: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Comes last but one, for obvious reasons."""
    model, urls = policy(tiny), [server.url for server in servers]
    engine = started(urls, model, tiny, tmp_path / "shared")
    sync(engine, model, 1)
    asked, sampling = requests(helpers, 6, 40, 2), Sampling(0.9, 150)
    whole = engine.generate(asked, sampling)

    async def generate_and_kill(server: RealServer) -> Samples:
        drawing = asyncio.create_task(asyncio.to_thread(engine.generate, asked, sampling))
        async with httpx.AsyncClient(base_url=server.url) as http:
            while not re.search(
                r"^vllm:num_requests_running\S* [1-9]", (await http.get("/metrics")).text, re.MULTILINE
            ):
                await asyncio.sleep(0.01)
        server.kill()
        assert not drawing.done()
        return await drawing

    again = asyncio.run(generate_and_kill(servers[0]))
    assert same(again, whole)
    (warning,) = [str(one.message) for one in recwarn if "vLLM server" in str(one.message)]
    assert f"{servers[0].url} is not used for now: it is gone" in warning
    alone = engine.generate(asked[:1], sampling)
    assert alone.completion_ids == whole.completion_ids[:2]
    engine.close()


def test_a_run_whose_last_server_is_killed_stops_and_can_go_on(
    servers: list[RealServer], tiny: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left, last = servers[1], tmp_path / "checkpoints/last.ckpt"

    def kill() -> None:
        while not last.exists():
            time.sleep(0.05)
        left.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    every_step = "[{class_path: rlmt.callbacks.PolicyCheckpoint, init_args: {every_n_steps: 1}}]"
    assert main(fit_words([left], tiny, prompts_file, tmp_path, "--trainer.callbacks", every_step)) == 2
    killer.join()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error:")]
    assert re.search(
        rf"no vLLM server can be used \({left.url} .*\); start them and go on with --ckpt_path last$", line
    )
    assert torch.load(last, weights_only=True)["global_step"] >= 1
    assert not list((tmp_path / "weights").iterdir())
    assert main(fit_words([left], tiny, prompts_file, tmp_path, "--ckpt_path", "last")) == 2
    assert f"rlmt: error: vLLM server {left.url} cannot be reached" in capsys.readouterr().err
