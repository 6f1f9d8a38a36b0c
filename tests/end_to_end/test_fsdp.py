"""Two ranks with FSDP2-sharded models, and a vLLM each or one over both, train what one process trains."""

import csv
import dataclasses
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from rlmt.cli.commands import main

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
OPTIONS = (  # SGD with momentum has a state, and rounding errors in small gradients hardly change its steps
    *("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.3", "--model.optimizer.momentum", "0.9"),
    *("--data.val_size", "0"),
)
VLLM = ("--data.engine", "VLLMEngine", "--data.engine.cpu_kv_cache_gib", "0.25")
TENSOR_PARALLEL = (*VLLM, "--data.engine.tensor_parallel_size", "2")
LOGGED = ("reward/mean", "reward/std", "policy/loss", "policy/grad_norm", "policy/entropy")


@pytest.fixture(scope="module")
def world(crash: Any, tiny: Path, prompts_file: Path) -> Any:
    return crash.World(tiny / "policy", tiny / "reward", prompts_file, OPTIONS)


def train(crash: Any, world: Any, run: Path, steps: int, *more: str, sharded: bool, resume: bool = False) -> Path:
    strategy = {"ranks": 2, "configs": ("fsdp",)} if sharded else {}
    options = (*world.options, *more, "--trainer.max_steps", str(steps))
    words = dataclasses.replace(world, options=options, **strategy).command(run, resume)
    crash.finish(crash.launch(words, run.with_suffix(".log"), ranks=2 if sharded else 1), run.with_suffix(".log"))
    return run


def metrics(run: Path) -> list[dict[str, float]]:
    with (run / "version_0/metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def samples(run: Path, steps: int) -> dict[Any, Any]:
    rows = [row for file in run.rglob("rollouts/*.parquet") for row in pq.read_table(file).to_pylist()]
    return {(r["step"], r["prompt_index"], r["sample"]): r["response"] for r in rows if r["step"] < steps}


def checkpoint(run: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(run / "latest/checkpoints/last.ckpt", weights_only=True)
    return saved


def assert_same_checkpoint(run: Path, other: Path) -> None:
    ours, theirs = checkpoint(run), checkpoint(other)
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, weight in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
    (left,), (right,) = (saved["optimizer_states"] for saved in (ours, theirs))
    assert left["state"].keys() == right["state"].keys() and len(left["state"]) > 10
    for number, state in right["state"].items():
        torch.testing.assert_close(left["state"][number], state, rtol=1e-3, atol=1e-4)


def assert_same_metrics_and_samples(run: Path, other: Path, steps: int) -> None:
    assert len(samples(other, steps)) == 16 * steps and samples(run, steps) == samples(other, steps)
    for ours, theirs in zip(metrics(run)[:steps], metrics(other)[:steps], strict=True):
        assert ours["engine/mismatch_max"] < 1e-3
        for name in LOGGED:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name


@pytest.mark.slow
@needs_vllm
def test_sharded_run_equals_the_run_of_one_process_and_resumes_in_one(crash: Any, world: Any, tmp_path: Path) -> None:
    alone = train(crash, world, tmp_path / "alone", 3, *VLLM, sharded=False)
    run = train(crash, world, tmp_path / "run", 2, *VLLM, sharded=True)
    assert_same_metrics_and_samples(run, alone, 2)
    assert len(list(run.rglob("rollouts/*rank1.parquet"))) == len(list(run.rglob("rollouts/*rank0.parquet"))) > 0
    assert_same_checkpoint(train(crash, world, run, 3, *VLLM, sharded=False, resume=True), alone)


@pytest.mark.slow
@needs_vllm
def test_vllm_per_rank_and_over_two_ranks_trains_the_same_policy(crash: Any, world: Any, tmp_path: Path) -> None:
    alone = train(crash, world, tmp_path / "alone", 4, *VLLM, sharded=False)
    run = train(crash, world, tmp_path / "run", 2, *VLLM, sharded=True)
    assert_same_metrics_and_samples(run, alone, 2)

    shutil.copytree(run, tmp_path / "resumed", symlinks=True)
    resumed_alone = train(crash, world, tmp_path / "resumed", 4, *VLLM, sharded=False, resume=True)
    train(crash, world, run, 4, *TENSOR_PARALLEL, "--trainer.strategy.offload", "true", sharded=True, resume=True)
    for resumed in (run, resumed_alone):
        assert_same_checkpoint(resumed, alone)
    assert_same_metrics_and_samples(run, alone, 4)

    assert main(["export", str(run / "latest/checkpoints/last.ckpt"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.slow
@needs_vllm
def test_policy_and_critic_with_adapters_on_two_ranks(crash: Any, world: Any, tmp_path: Path) -> None:
    more = ("--model.algorithm", "PPO", "--model.algorithm.critic_lr", "0.1", "--model.lora", "LoRA")
    alone = train(crash, world, tmp_path / "one", 2, *more, *VLLM, sharded=False)
    run = train(crash, world, tmp_path / "two", 2, *more, *TENSOR_PARALLEL, sharded=True)
    assert_same_checkpoint(run, alone)
    assert_same_metrics_and_samples(run, alone, 2)


@pytest.mark.slow
@needs_vllm
def test_rounded_hidden_states_change_no_more_than_rounding(crash: Any, world: Any, tmp_path: Path) -> None:
    mixed = (*VLLM, "--trainer.precision", "bf16-mixed")
    runs = [
        train(crash, world, tmp_path / value, 2, *mixed, "--trainer.strategy.bf16_residual", value, sharded=True)
        for value in ("false", "true")
    ]
    assert samples(runs[0], 1) == samples(runs[1], 1)
    plain, rounded = (metrics(run)[0] for run in runs)
    assert plain["policy/grad_norm"] != rounded["policy/grad_norm"]
    for name in ("policy/grad_norm", "policy/entropy"):
        assert rounded[name] == pytest.approx(plain[name], rel=0.05), name
    assert all(run["engine/mismatch_kl"] < 1e-3 for run in (plain, rounded))
