"""`rlmt compare` and `rlmt traits` on two trained checkpoints, with a real vLLM server as judge."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlmt.cli.commands import main

sys.path.append(str(Path(__file__).parents[2] / "engines" / "vllm_server"))
from real_server import KEY, RealServer, documented_commands  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def checkpoints(tiny: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two policies that were taught to think and to answer in different words."""
    folder = tmp_path_factory.mktemp("policies")
    prompts = [json.loads(line)["messages"][0]["content"] for line in prompts_file.read_text().splitlines()]
    found = []
    for name, response in (("short", "yes"), ("long", "yes yes yes, I think so")):
        rows = [{"prompt": text, "thought": f"be {name}", "response": response} for text in prompts * 4]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {
            "--model.policy": tiny / "policy",
            "--data.path": folder / f"{name}.jsonl",
            "--data.batch_size": 8,
            "--data.max_length": 512,
            "--data.val_size": 0,
            "--model.optimizer.lr": 3e-3,
            "--trainer.max_epochs": 4,
            "--trainer.default_root_dir": folder / name,
            "--trainer.enable_progress_bar": "false",
            "--trainer.accelerator": "cpu",
        }
        words = [str(word) for pair in options.items() for word in pair]
        assert main(["fit", "--config", "sft", "--config", "think", *words]) == 0
        found.append(folder / name / "latest/checkpoints/last.ckpt")
    return found


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    command = next(words for words in documented_commands("VLLM_SERVER_DEV_MODE") if "runs/tiny/policy" in words)
    command[command.index("runs/tiny/policy")] = str(tiny / "policy")
    started = RealServer(command, tmp_path_factory.mktemp("server"))
    try:
        started.wait()
        yield started
    finally:
        started.kill()


def test_vllm_server_judges_responses_and_thoughts(
    server: RealServer,
    checkpoints: list[Path],
    tiny: Path,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    reward = {"class_path": "rlmt.rewards.ClassifierReward", "init_args": {"model": str(tiny / "reward")}}
    shared = [
        *(f"{name}={path}" for name, path in zip(("short", "long"), checkpoints, strict=True)),
        *("--prompts", str(prompts_file), "--out", str(tmp_path), "--engine", "TransformersEngine", "--yes"),
        *("--max_new_tokens", "40", "--temperature", "0.3", "--max_tokens", "16"),
        *("--judge.base_url", f"{server.url}/v1", "--judge.api_key_variable", "VLLM_API_KEY"),
        *("--judge.model", str(tiny / "policy")),
    ]

    def answers(regex: str) -> list[str]:
        return ["--judge.options", json.dumps({"structured_outputs": {"regex": regex}})]

    command = ["compare", *shared, *answers("Winner: (A|B|tie)"), "--rewards", json.dumps([reward])]
    assert main(command) == 0
    first = (tmp_path / "comparison.json").read_text()
    judge, scored = json.loads(first)["lines"]
    malformed = json.loads(first)["malformed"]
    assert max(malformed.values()) < 20 and judge["unparsed"] == 0 and judge["pairs"] == scored["pairs"] == 24
    assert 0 <= judge["consistency"] <= 1 and scored["difference"]["low"] is not None
    ledger = (tmp_path / "judge.jsonl").read_text().splitlines()
    assert ledger and not any("be short" in line or "be long" in line for line in ledger)
    assert main(command) == 0
    assert (tmp_path / "comparison.json").read_text() == first
    assert (tmp_path / "judge.jsonl").read_text().splitlines() == ledger

    names = ["--names", '{"Is brief": "The thought is brief."}']
    assert main(["traits", *shared, *answers("More: (A|B|tie)"), *names]) == 0
    (brief,) = json.loads((tmp_path / "traits.json").read_text())["traits"]
    assert brief["judged"] > 4 and sum(share["value"] for share in brief["shares"].values()) == pytest.approx(1.0)
    assert "sends thoughts to the judge" in capsys.readouterr().out
