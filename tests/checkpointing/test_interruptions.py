"""Runs whose disk, reward, engine, samples or prompts fail: what is saved, what is reported, how they resume."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlmt.checkpointing import files
from rlmt.checkpointing.signals import SignalHandler, StoppedBySignal
from rlmt.cli.commands import main
from rlmt.engines import TransformersEngine
from rlmt.engines.rollout_files import read_rollouts
from rlmt.types import FinishReason, Samples

Fit = Callable[..., int]


@pytest.fixture
def fit(tiny: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """`fit("--data.x", 1)` trains for four rollouts on tiny models in tmp_path/run, with a checkpoint after each."""
    monkeypatch.chdir(tmp_path)
    callbacks = "{class_path: rlmt.callbacks.PolicyHealth}, {class_path: rlmt.callbacks.RewardCurves}, "
    callbacks += "{class_path: rlmt.callbacks.CoTLength}, {class_path: rlmt.callbacks.SampleTable}, "
    checkpoint = "{class_path: rlmt.callbacks.PolicyCheckpoint, init_args: {every_n_steps: 1, on_full: %s}}"

    def run(*more: object, on_full: str = "stop") -> int:
        Path("every_step.yaml").write_text(f"trainer: {{callbacks: [{callbacks}{checkpoint % on_full}]}}")
        options = {
            "--model.policy": tiny / "policy",
            "--model.reward.model": tiny / "reward",
            "--model.format": "no_think",
            "--data.prompts": prompts_file,
            "--data.engine": "TransformersEngine",
            "--data.batch_size": 4,
            "--data.group_size": 4,
            "--data.max_prompt_tokens": 256,
            "--data.max_new_tokens": 8,
            "--data.val_size": 0,
            "--trainer.max_steps": 4,
            "--trainer.default_root_dir": tmp_path / "run",
            "--trainer.enable_progress_bar": "false",
        }
        words = [str(word) for pair in options.items() for word in pair]
        configs = [word for name in ("base", "grpo", "tiny", "every_step.yaml") for word in ("--config", name)]
        return main(["fit", *configs, *words, *map(str, more)])

    return run


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "version_0" / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def saved_step(run: Path) -> int:
    """The last step in the newest checkpoint, which is complete and the only one."""
    folder = run / "latest" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "policy"]
    step: int = torch.load(folder / "last.ckpt", weights_only=True)["run"]["step"]
    return step


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error: ")]
    return line


# Signals --------------------------------------------------------------------------------------------------------------


def test_second_ctrl_c_does_not_interrupt_the_checkpoint(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first comes in the third rollout, the second while the checkpoint of the first two steps is written."""
    generate, save, calls = TransformersEngine.generate, torch.save, []

    def interrupted(engine: TransformersEngine, *args: Any) -> Samples:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return generate(engine, *args)

    def interrupted_save(checkpoint: Any, file: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save(checkpoint, file)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", interrupted)
        patch.setattr(files.torch, "save", interrupted_save)
        try:
            status = fit(
                "--trainer.callbacks",
                "[{class_path: rlmt.callbacks.PolicyCheckpoint, init_args: {every_n_steps: 100}}]",
            )
        finally:
            signal.signal(signal.SIGINT, handler)  # Lightning ignores it from the first Ctrl+C on
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rlmt: SIGINT: ")]
    assert status == 130
    assert "is stopping and writes its checkpoint; sent again, it stops without." in lines[0]
    assert "last.ckpt has the first 2 steps; the same command with --ckpt_path last resumes from there." in lines[1]
    assert saved_step(tmp_path / "run") == 1


def test_third_ctrl_c_stops_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    signals = SignalHandler(savable=lambda: True)
    with pytest.raises(StoppedBySignal):
        signals._on_signal(signal.SIGINT, None)
    signals._on_signal(signal.SIGINT, None)
    assert "sent again, it stops without." in capfd.readouterr().err
    with pytest.raises(StoppedBySignal):
        signals._on_signal(signal.SIGINT, None)


# The disk ------------------------------------------------------------------------------------------------------------


def test_truncated_write_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    """The operating system truncates the file, by a limit on file sizes."""
    import resource
    import signal

    io, path = files.AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"x": torch.arange(10)}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError) as caught:
            io.save_checkpoint({"x": torch.arange(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.errno == errno.EFBIG
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.equal(io.load_checkpoint(path)["x"], torch.arange(10))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Truncates the third and the fourth checkpoint; the list has one entry per write."""
    attempts: list[int] = []
    save = torch.save

    def truncated(checkpoint: Any, file: Any) -> None:
        attempts.append(1)
        if len(attempts) in (3, 4):
            file.write(b"PK\x03\x04 half a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(checkpoint, file)

    monkeypatch.setattr(files.torch, "save", truncated)
    return attempts


def test_full_disk_stops_the_run_and_keeps_the_last_checkpoint(
    fit: Fit, tmp_path: Path, full_disk: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit() == 2
    message = error_of(capsys)
    assert "last.ckpt cannot be written (No space left on device)" in message and "Free disk space" in message
    assert saved_step(tmp_path / "run") == 1
    full_disk += [1] * 2
    assert fit("--ckpt_path", "last") == 0
    assert saved_step(tmp_path / "run") == 3
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.mark.slow
def test_full_disk_only_warns_with_on_full_continue(fit: Fit, tmp_path: Path, full_disk: list[int]) -> None:
    with pytest.warns(UserWarning, match="No space left on device.*the previous checkpoint is complete"):
        assert fit("--trainer.max_steps", 5, on_full="continue") == 0
    assert saved_step(tmp_path / "run") == 4 and len(full_disk) == 5


@pytest.mark.slow
def test_rollouts_wait_for_disk_space_and_are_written_after_a_resume(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No checkpoint is written without its rollouts; a run without any space ends with one line."""

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert fit("--trainer.max_steps", 1) == 0
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="the previous checkpoint is complete"):
        patch.setattr("rlmt.engines.rollout_files.pq.write_table", full)
        patch.setattr("rlmt.report.curves.draw_curves", full)
        assert fit("--ckpt_path", "last", on_full="continue") == 2
    assert error_of(capsys).startswith("rlmt: error: The disk is full")
    assert len(rows(tmp_path / "run")) == 4 and saved_step(tmp_path / "run") == 0
    assert fit("--ckpt_path", "last") == 0
    assert len(rows(tmp_path / "run")) == 4 and saved_step(tmp_path / "run") == 3
    steps = read_rollouts(tmp_path / "run" / "version_0" / "rollouts")["step"].to_pylist()
    assert steps == [step for step in range(4) for _ in range(16)]


@pytest.mark.slow
def test_unfinished_checkpoint_of_a_killed_run_is_removed_when_it_is_resumed(fit: Fit, tmp_path: Path) -> None:
    assert fit("--trainer.max_steps", 1) == 0
    folder = tmp_path / "run" / "version_0" / "checkpoints"
    (folder / ".last.ckpt.unfinished").write_bytes(b"half")
    (folder / "mine.ckpt").write_bytes(b"of the user")
    assert fit("--trainer.max_steps", 2, "--ckpt_path", "last") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "mine.ckpt", "policy"]


# The reward and the engine -------------------------------------------------------------------------------------------

REWARDS = """
import torch
from rlmt.rewards import Reward

calls = []


class FailsAtThirdBatch(Reward):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def score(self, prompts, responses, statuses):
        calls.append(1)
        scores = torch.tensor([float(len(text) % 7) for text in responses])
        if len(calls) < 3:
            return scores
        return scores * float("nan") if self.kind == "nan" else scores[:, None]
"""


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("nan", "that are not finite"), pytest.param("shape", "scores of shape", marks=pytest.mark.slow)],
)
def test_invalid_rewards_end_the_run_with_one_line_and_lose_no_step(
    kind: str,
    reason: str,
    fit: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / f"rewards_{kind}.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    reward = ("--model.reward", f"rewards_{kind}.FailsAtThirdBatch", "--model.reward.kind", kind)
    # The run itself saves a checkpoint when it fails; the one of PolicyCheckpoint is older.
    assert fit(*reward, "--model.algorithm.minibatches", 2, "--trainer.max_steps", 8) == 2
    message = error_of(capsys)
    assert reason in message and "'reward'" in message and "--ckpt_path last" in message
    assert saved_step(tmp_path / "run") == 1


def test_failing_engine_loses_no_step(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, calls = TransformersEngine.generate, []

    def failing(self: TransformersEngine, *args: Any) -> Samples:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the engine died")
        return generate(self, *args)

    monkeypatch.setattr(TransformersEngine, "generate", failing)
    checkpoint = "{class_path: rlmt.callbacks.PolicyCheckpoint, init_args: {every_n_steps: 100}}"
    (tmp_path / "rarely.yaml").write_text(
        f"trainer: {{callbacks: [{{class_path: rlmt.callbacks.RewardCurves}}, {checkpoint}]}}"
    )
    with pytest.raises(RuntimeError, match="the engine died"), monkeypatch.context() as patch:
        patch.setattr("rlmt.errors._LIBRARIES", [Path("/")])  # no user's own code raised it
        fit("--config", "rarely.yaml")
    assert saved_step(tmp_path / "run") == 1
    assert fit("--ckpt_path", "last") == 0
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == [0, 1, 2, 3]


HANGING = """
import signal
import time

from rlmt.engines import TransformersEngine

calls = []


class Hanging(TransformersEngine):
    def generate(self, *args):
        calls.append(1)
        if len(calls) == 3:
            time.sleep(1000)
        return super().generate(*args)


def ignore_sigterm_and_hang(log):
    import os

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    from rlmt.checkpointing import watchdog

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watchdog.GRACE = 2
    with watchdog.time_limit(0.1, "an engine", "--data.engine_timeout"):
        time.sleep(1000)
"""


@pytest.mark.slow
def test_hanging_engine_ends_the_run_after_its_timeout(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hanging_engine.py").write_text(HANGING)
    monkeypatch.syspath_prepend(tmp_path)
    assert fit("--data.engine", "hanging_engine.Hanging", "--data.engine_timeout", 5) == 75
    printed = capfd.readouterr().err
    assert "rlmt: error: Hanging has not answered for 5 s (--data.engine_timeout); the run ends." in printed
    assert "in generate" in printed  # the stack trace of the hanging call
    assert saved_step(tmp_path / "run") == 1
    with pytest.warns(UserWarning, match=r"--data.engine was 'hanging_engine.Hanging' and is 'rlmt.engines.Transf"):
        assert fit("--ckpt_path", "last") == 0
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.mark.slow
def test_process_that_ignores_sigterm_is_killed_after_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import multiprocessing

    (tmp_path / "ignoring_engine.py").write_text(HANGING)
    monkeypatch.syspath_prepend(tmp_path)
    import ignoring_engine  # type: ignore[import-not-found]

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlmt.cli.lightning_cli", "rlmt.callbacks", "rlmt.modules"])
    process = context.Process(target=ignoring_engine.ignore_sigterm_and_hang, args=(str(tmp_path / "log"),))
    process.start()
    process.join()
    assert process.exitcode == 75
    assert "an engine has not answered for 0.1 s (--data.engine_timeout)" in (tmp_path / "log").read_text()


# The samples ---------------------------------------------------------------------------------------------------------


def test_batches_without_a_learning_signal_are_skipped_and_counted(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No thought closes within three tokens, so all samples are malformed and all rewards are equal."""
    options = ("--model.format", "think", "--data.max_new_tokens", 3, "--model.max_idle", 3)
    assert fit(*options, "--trainer.default_root_dir", "malformed") == 2
    error = error_of(capsys)
    assert "Stopped after 3 consecutive rollout batches without a learning signal (--model.max_idle)" in error
    assert "all samples are malformed" in error
    found = rows(tmp_path / "malformed")
    assert len(found) == 2
    for row in found:
        assert (row["reward/malformed"], row["reward/zero_std_groups"]) == ("1.0", "1.0")
        assert (row["policy/skipped"], row["engine/weight_version"]) == ("1.0", "0.0")


@pytest.mark.slow
def test_batch_whose_samples_are_all_masked_is_skipped(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for algorithm in ((), ("--model.algorithm", "PPO")):
        folder = f"masked{len(algorithm)}"
        truncated = ("--model.algorithm.mask_truncated", "true", "--model.max_idle", 2)
        assert fit(*algorithm, *truncated, "--data.max_new_tokens", 1, "--trainer.default_root_dir", folder) == 2
        assert "all samples are truncated and left out of the loss" in error_of(capsys), algorithm


class UnusualCompletions(TransformersEngine):
    """Returns completions that a policy seldom samples, whatever the prompt, with a log-prob of -1 a token."""

    def generate(self, requests: Any, sampling: Any) -> Samples:
        tokenizer, end = self._tokenizer, sampling.stop_token_ids[0]
        special = tokenizer.all_special_ids
        text = tokenizer("a\x00b \ud7ff \uffff ok", add_special_tokens=False)["input_ids"]
        cut = tokenizer("\N{GRINNING FACE}", add_special_tokens=False)["input_ids"][:-1] or [
            end
        ]  # an incomplete character
        choices = [[end], [*special, end], [*text, end], [*cut, end], [*text, *special], [special[0]] * 8]
        count = sum(len(request.seeds) for request in requests)
        ids = [choices[k % len(choices)][: sampling.max_new_tokens] for k in range(count)]
        finish = [FinishReason.STOP if row[-1] == end else FinishReason.LENGTH for row in ids]
        return Samples(ids, [[-1.0] * len(row) for row in ids], finish, self.version or 0)


@pytest.mark.parametrize(
    ("algorithm", "form"),
    [
        ("GRPO", "no_think"),
        pytest.param("PPO", "no_think", marks=pytest.mark.slow),
        pytest.param("DPO", "no_think", marks=pytest.mark.slow),
        pytest.param("PPO", "think", marks=pytest.mark.slow),  # all are malformed, which GRPO and DPO skip
    ],
)
def test_empty_special_and_incomplete_responses_are_trained_on(
    algorithm: str, form: str, fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransformersEngine, "generate", UnusualCompletions.generate)
    options: tuple[object, ...] = ("--model.algorithm", algorithm, "--model.format", form, "--trainer.max_steps", 2)
    options += ("--model.algorithm.min_valid", 2) if algorithm == "DPO" else ()
    assert fit(*options, "--data.max_new_tokens", 32) == 0
    found = rows(tmp_path / "run")
    assert len(found) == 2
    # With equal rewards the explained variance is undefined; no response is well-formed.
    undefined = (
        {"reward/reward_model", "critic/explained_variance", "response/distinct_2"} if form == "think" else set()
    )
    for row in found:
        assert {k for k, v in row.items() if not math.isfinite(float(v))} <= (undefined if form == "think" else set())
    table = read_rollouts(tmp_path / "run" / "version_0" / "rollouts").to_pylist()
    assert {row["status"] for row in table} == ({"ok", "empty_response"} if form == "no_think" else {"unclosed"})
    if form == "no_think":
        assert any("\x00" in row["scored_text"] for row in table if row["scored_text"])
        assert all(row["scored_text"] is None for row in table if row["status"] != "ok")
    assert torch.isfinite(
        torch.cat(
            [
                t.flatten()
                for t in torch.load("run/latest/checkpoints/last.ckpt", weights_only=True)["state_dict"].values()
            ]
        )
    ).all()


# The prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_last_prompt_ends_the_run_or_starts_the_next_epoch(fit: Fit, tmp_path: Path) -> None:
    assert fit("--trainer.max_epochs", 1, "--trainer.max_steps", -1, "--trainer.default_root_dir", "one") == 0
    assert len(rows(tmp_path / "one")) == 6
    assert fit("--trainer.max_steps", 8, "--trainer.default_root_dir", "two") == 0
    assert [float(row["epoch"]) for row in rows(tmp_path / "two")] == [0.0] * 6 + [1.0] * 2


@pytest.mark.slow
def test_nuls_are_preserved_and_lone_surrogates_rejected_with_their_row(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "odd.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say \x00 {k} \x1b[31m"}) + "\n" for k in range(4)))
    assert fit("--data.prompts", prompts, "--trainer.max_steps", 1) == 0
    table = read_rollouts(tmp_path / "run" / "version_0" / "rollouts")
    assert {row[0]["content"] for row in table["messages"].to_pylist()} == {f"say \x00 {k} \x1b[31m" for k in range(4)}
    capsys.readouterr()
    prompts.write_text('{"prompt": "fine"}\n{"prompt": "not \\ud800"}\n')
    assert fit("--data.prompts", prompts) == 2
    message = error_of(capsys)
    assert "odd.jsonl" in message and "line 2" in message and "lone surrogate" in message
