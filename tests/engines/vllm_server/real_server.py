"""Real vLLM servers, started with the commands of docs/rollout-servers.md, and helpers to run the engine on them."""

from __future__ import annotations

import csv
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import PreTrainedModel

from rlmt.cli.commands import main
from rlmt.engines import VLLMServerEngine
from rlmt.models import loading
from rlmt.models.adapters import adapter_weights, base_tensors, trainable_parameters
from rlmt.types import SampleRequest, Samples

DOCS = Path(__file__).parents[3] / "docs" / "rollout-servers.md"
KEY = "open-sesame-3141"


SGD = (  # unlike Adam, it does not amplify rounding errors of small gradients
    *("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.3", "--model.optimizer.momentum", "0.9"),
)


def documented_commands(prefix: str) -> list[list[str]]:
    """Arguments of each command in the documentation that starts with a text."""
    blocks = re.findall(r"```sh\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(prefix)]


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


class RealServer:
    """A server started as in the documentation, but on a free port."""

    def __init__(self, command: list[str], folder: Path) -> None:
        first = command.index("python")
        env = dict(word.split("=", 1) for word in command[:first])
        self.arguments = [sys.executable, *command[first + 1 :]]
        port = free_port()
        self.arguments[self.arguments.index("--port") + 1] = str(port)
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"{port}.log"
        self.environment = os.environ | env | {"VLLM_API_KEY": KEY}
        self.start()

    def start(self) -> None:
        """Starts the server, again after `kill`."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.arguments,
                env=self.environment,
                cwd=self.log.parent,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that `kill` can end all of its processes
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


@contextmanager
def two_servers(
    tiny: Path, folder: Path, environment: Sequence[str] = (), options: Sequence[str] = ()
) -> Iterator[list[RealServer]]:
    """The two documented servers for a CPU, in a folder of their own, with more variables and options."""
    (folder / "runs").mkdir()
    (folder / "runs/tiny").symlink_to(tiny)
    started = [
        RealServer([*environment, *words, *options], folder)
        for words in documented_commands("VLLM_SERVER_DEV_MODE")
        if "runs/tiny/policy" in words
    ]
    try:
        assert len(started) == 2
        for server in started:
            server.wait()
        yield started
    finally:
        for server in started:
            if server.process.poll() is None:
                server.kill()


class Proxy:
    """A TCP proxy to a server, which can be closed."""

    def __init__(self, url: str) -> None:
        self.target = ("127.0.0.1", int(url.rpartition(":")[2]))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.sockets = [self.listener]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                pair = [self.listener.accept()[0], socket.create_connection(self.target)]
                self.sockets += pair
                for ends in (pair, pair[::-1]):
                    threading.Thread(target=self.forward, args=ends, daemon=True).start()

    def forward(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for each in self.sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def load_policy(tiny: Path) -> PreTrainedModel:
    return loading.load_policy(tiny / "policy", "float32").train()


def start(urls: list[str], model: PreTrainedModel, tiny: Path, shared: Path, **options: Any) -> VLLMServerEngine:
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


def make_requests(helpers: Any, count: int = 6, length: int = 70, samples: int = 3) -> list[SampleRequest]:
    return [
        SampleRequest(prompt, [2**63 - 1 - 10 * i - k for k in range(samples)])
        for i, prompt in enumerate(helpers.prompts(count, length))
    ]


def same_samples(first: Samples, second: Samples) -> bool:
    """Whether two batches have equal tokens and finish reasons, and log-probs equal up to rounding."""
    difference = max(
        abs(a - b) for x, y in zip(first.logprobs, second.logprobs, strict=True) for a, b in zip(x, y, strict=True)
    )
    return first.completion_ids == second.completion_ids and first.finish == second.finish and difference < 1e-4


def fit_arguments(
    servers: Sequence[RealServer | Proxy], tiny: Path, prompts: Path, run: Path, *more: object
) -> list[str]:
    """Arguments of the documented command, with smaller batches."""
    command = next(
        words for words in documented_commands("rlmt fit") if "lora" not in words and "--data.rollout_lag" in words
    )
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
    """Trains, and returns the metrics of all steps of the run so far."""
    assert main(fit_arguments(servers, tiny, prompts, run, *more)) == 0
    return metrics(run)


def metrics(run: Path) -> list[dict[str, str]]:
    rows: dict[int, dict[str, str]] = {}
    for path in sorted(run.glob("version_*/metrics.csv")):
        with path.open() as file:
            rows |= {int(row["step"]): row for row in csv.DictReader(file) if row["reward/mean"]}
    return [rows[step] for step in sorted(rows)]


def launch_two_ranks(crash: Any, arguments: list[str], config: str, log: Path) -> Any:
    """Starts the same run on two ranks."""
    options = ["--config", config, "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    return crash.launch([*arguments, *options], log, ranks=2, VLLM_API_KEY=KEY)
