"""`rlmt evaluate` with vLLM in its process and a real vLLM server as judge, killed in generation and in judging."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parent / "engines" / "vllm_server"))

from real_server import KEY, RealServer, documented_commands  # noqa: E402
from toys import PROMPTS, write_data  # noqa: E402

from rlmt.cli.commands import main  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(3600),
]


def sft(policy: Path, rows: list[dict[str, str]], run: Path, form: str) -> Path:
    """Fine-tunes a policy on rows and returns the exported folder."""
    data = run.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "--model.policy": policy,
        "--data.path": data,
        "--data.batch_size": 8,
        "--data.max_length": 512,
        "--data.val_size": 0,
        "--model.optimizer.lr": 3e-3,
        "--trainer.max_epochs": 4,
        "--trainer.default_root_dir": run,
        "--trainer.enable_progress_bar": "false",
        "--trainer.accelerator": "cpu",
    }
    words = [str(word) for pair in options.items() for word in pair]
    assert main(["fit", "--config", "sft", "--config", form, *words]) == 0
    assert main(["export", str(run / "latest/checkpoints/last.ckpt"), str(run / "model")]) == 0
    return run / "model"


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy that thinks, one that does not, and a judge that answers `win`, mostly."""
    folder = tmp_path_factory.mktemp("models")
    plain = [{"prompt": prompt, "thought": "plan", "response": "a red moon"} for prompt in PROMPTS * 12]
    judged = [
        {"prompt": f"Prompt: {prompt}\nA: e\nB: {text}", "thought": "x", "response": "win"}
        for prompt in PROMPTS
        for text in ("a red moon", "a red", "moon", "e", "red moon cat", "a")
    ]
    return {
        "think": sft(tiny / "policy", plain, folder / "think", "think"),
        "no_think": sft(tiny / "policy", plain, folder / "no_think", "no_think"),
        "judge": sft(tiny / "policy", judged * 2, folder / "judge", "no_think"),
    }


@pytest.fixture(scope="module")
def server(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    command = next(words for words in documented_commands("VLLM_SERVER_DEV_MODE") if "runs/tiny/policy" in words)
    command[command.index("runs/tiny/policy")] = str(models["judge"])
    started = RealServer(command, tmp_path_factory.mktemp("server"))
    try:
        started.wait()
        yield started
    finally:
        started.kill()


def kill_when(command: list[str], ready: Callable[[], bool], log: Path) -> None:
    """Starts a command as a user does, and kills it with SIGKILL when `ready`."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "PYTHONPATH": python_path()})
        while not ready():
            assert process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL


def python_path() -> str:
    return os.pathsep.join([*(path for path in sys.path if path), str(FOLDER)])


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def test_killed_evaluation_with_vllm_gives_the_table_of_an_uninterrupted_one(
    models: dict[str, Path], server: RealServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    data = str(write_data(tmp_path / "data.jsonl"))

    def words(out: Path) -> list[str]:
        judge = ["--judge.base_url", f"{server.url}/v1", "--judge.model", str(models["judge"])]
        judge += ["--judge.api_key_variable", "JUDGE_KEY", "--judge.max_in_flight", "1"]
        options = ["--benchmarks", "[toys.Duel, toys.Letters]", "--data.duel", data, "--data.letters", data]
        options += ["--engine", "VLLMEngine", "--engine.max_num_seqs", "8", "--max_new_tokens", "24"]
        named = [f"RLMT={models['think']}", f"RLHF={models['no_think']}"]
        return ["evaluate", *named, *options, *judge, "--out", str(out), "--batch_size", "2", "--yes"]

    killed, log = tmp_path / "killed", tmp_path / "log.txt"
    command = [sys.executable, "-m", "rlmt", *words(killed)]
    parts = killed / "duel" / "RLMT" / "completions"
    kill_when(command, lambda: len(list(parts.glob("part-*"))) >= 2, log)
    written = {path: path.stat().st_mtime_ns for path in parts.glob("part-*")}
    kill_when(command, lambda: len(lines(killed / "ledger.jsonl")) >= 3, log)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in written.items())
    answered = lines(killed / "ledger.jsonl")
    assert main(words(killed)) == 0
    recorded = lines(killed / "ledger.jsonl")
    assert recorded[: len(answered)] == answered
    assert len({row["key"] for row in recorded}) == len(recorded)

    assert main(words(tmp_path / "whole")) == 0
    for out in (killed, tmp_path / "whole"):
        assert main(["evaluate", "--table", "--out", str(out)]) == 0
    table = (killed / "table.ours.md").read_text()
    assert table == (tmp_path / "whole" / "table.ours.md").read_text()
    assert "RLMT − RLHF" in table
    result = json.loads((killed / "duel" / "RLMT" / "ours.json").read_text())
    assert result["malformed"] < result["n"] == len(PROMPTS)
    assert result["thought_tokens"] > 0 and result["judge_versions"] == [str(models["judge"])]
