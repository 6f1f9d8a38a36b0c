"""Demonstrations from a real vLLM server and from vLLM in this process, then SFT of both arms and GRPO."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_server import KEY, RealServer, documented_commands
from unreliable import read_lines

from rlmt.cli.commands import main
from rlmt.formats.thinking import ThinkingFormat

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(1800),
]

QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu")
INSTRUCTION = "Plan in <think> </think>, then answer."


def sft(policy: Path, data: Path, run: Path, form: str, epochs: int) -> Path:
    """Fine-tunes a policy and returns the exported folder."""
    options = {
        "--model.policy": policy,
        "--data.path": data,
        "--data.batch_size": 8,
        "--data.max_length": 512,
        "--data.val_size": 0,
        "--model.optimizer.lr": 3e-3,
        "--trainer.max_epochs": epochs,
        "--trainer.default_root_dir": run,
    }
    words = [str(word) for pair in options.items() for word in pair]
    assert main(["fit", "--config", "sft", "--config", form, *words, *QUIET]) == 0
    assert main(["export", str(run / "latest/checkpoints/last.ckpt"), str(run / "model")]) == 0
    return run / "model"


@pytest.fixture(scope="module")
def teacher(tiny: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that answers in the format, mostly."""
    folder = tmp_path_factory.mktemp("teacher")
    prompts = [row["messages"][0]["content"] for row in read_lines(prompts_file)]
    rows = [{"prompt": f"{text}\n\n{INSTRUCTION}", "thought": "plan", "response": "answer"} for text in prompts * 4]
    (folder / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sft(tiny / "policy", folder / "demos.jsonl", folder / "run", "think", 4)


@pytest.fixture(scope="module")
def server(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    command = next(words for words in documented_commands("VLLM_SERVER_DEV_MODE") if "runs/tiny/policy" in words)
    command[command.index("runs/tiny/policy")] = str(teacher)
    started = RealServer(command, tmp_path_factory.mktemp("server"))
    try:
        started.wait()
        yield started
    finally:
        started.kill()


def distill(prompts: Path, out: Path, *more: str) -> None:
    words = ["--prompts", str(prompts), "--out", str(out), "--yes", "--instruction", INSTRUCTION, "--max_tokens", "40"]
    assert (
        main(
            [
                "distill",
                "--config",
                "distill",
                *words,
                "--tries",
                "3",
                "--temperature",
                "0.4",
                "--teacher.options",
                "null",
                *more,
            ]
        )
        == 0
    )


def check_demonstrations(out: Path, prompts: int) -> None:
    rows = read_lines(out)
    assert len(rows) + len(read_lines(out.with_name("demos.rejected.jsonl"))) == prompts and len(rows) >= 8
    for row in rows:
        text = ThinkingFormat("think").target(row["thought"], row["response"])
        assert ThinkingFormat("think").split(text).ok


def test_vllm_server_teaches_a_policy_that_grpo_trains(
    server: RealServer, teacher: Path, tiny: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    out = tmp_path / "demos.jsonl"
    at_server = ("--teacher.base_url", f"{server.url}/v1", "--teacher.api_key_variable", "VLLM_API_KEY")
    distill(prompts_file, out, "--teacher.model", str(teacher), *at_server)
    check_demonstrations(out, 24)
    usage = [row["answer"]["usage"] for row in read_lines(tmp_path / "demos.ledger.jsonl")]
    assert all(entry["prompt_tokens"] > 0 and entry["completion_tokens"] > 0 for entry in usage)

    for form in ("no_think", "think"):
        warm = sft(tiny / "policy", out, tmp_path / form, form, 1)
    options = {
        "--model.policy": warm,
        "--model.reward.model": tiny / "reward",
        "--data.prompts": prompts_file,
        "--data.engine": "TransformersEngine",
        "--data.batch_size": 4,
        "--data.group_size": 4,
        "--data.max_prompt_tokens": 256,
        "--data.max_new_tokens": 32,
        "--data.val_size": 0,
        "--trainer.max_steps": 2,
        "--trainer.default_root_dir": tmp_path / "grpo",
    }
    words = [str(word) for pair in options.items() for word in pair]
    assert main(["fit", "--config", "base", "--config", "grpo", "--config", "tiny", *words, *QUIET]) == 0
    with (tmp_path / "grpo/latest/metrics.csv").open() as file:
        steps = [row for row in csv.DictReader(file) if row["reward/mean"]]
    assert len(steps) >= 2  # steps without a learning signal do not count


def test_folder_as_teacher_gives_the_same_demonstrations_again(
    teacher: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []
    for name in ("first", "second"):
        out = tmp_path / name / "demos.jsonl"
        distill(prompts_file, out, "--teacher.model", str(teacher), "--teacher.base_url", "")
        check_demonstrations(out, 24)
        written.append(out.read_bytes())
    assert written[0] == written[1]
    assert "US$ 0.00" in capsys.readouterr().out
