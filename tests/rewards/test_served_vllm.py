"""ServedReward against a real vLLM pooling server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from rlmt.endpoints import Endpoint
from rlmt.errors import UserError
from rlmt.rewards import ClassifierReward, ServedReward
from rlmt.types import Prompt, Status

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server of the tiny reward model, started as in docs/how-to/served-reward.md, in float32."""
    folder = tmp_path_factory.mktemp("vllm")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny / "reward")]
    command += ["--runner", "pooling", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "512", "--served-model-name", "rm", "--enforce-eager"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        while True:
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_scores_of_a_server_equal_those_in_process(server: str, tiny: Path) -> None:
    model = str(tiny / "reward")
    local = ClassifierReward(model, dtype="float32", max_length=300)
    served = ServedReward(model, [Endpoint(server, "rm")], max_length=300, batch_size=7)
    texts = ["Here is a plan.", "No", "x", "Take the train to Rome, then walk. " * 20, "é 👍\n\n- a\n- b"]
    prompts = [Prompt(i, [{"role": "user", "content": f"Plan {i} days"}]) for i in range(20)]
    responses = [f"{texts[i % 5]} {i}" for i in range(20)]
    scores = []
    for reward in (local, served):
        reward.check()
        reward.load()
        scores.append(reward.score(prompts, responses, [Status.OK] * 20))
        reward.close()
    assert scores[0].std() > 0.1
    torch.testing.assert_close(scores[1], scores[0], atol=1e-5, rtol=0)


def test_refused_input_is_an_error(server: str, tiny: Path) -> None:
    reward = ServedReward(str(tiny / "reward"), [Endpoint(server, "rm")], max_length=1000)
    reward.check()
    reward.load()
    with pytest.raises(UserError, match="the request was refused .status 400"):
        reward.score([Prompt(0, [{"role": "user", "content": "a"}])], ["word " * 900], [Status.OK])
