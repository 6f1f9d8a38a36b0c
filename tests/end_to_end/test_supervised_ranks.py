"""SFT and reward models on two ranks through the command line, and resumed on another number of ranks."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlmt.cli.commands import main

pytestmark = pytest.mark.usefixtures("no_plots")
Command = Callable[..., list[str]]
# SGD with momentum has a state, and rounding errors in small gradients hardly change its steps.
COMMON = (
    *("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", 0.3, "--model.optimizer.momentum", 0.9),
    *("--model.scheduler", "null", "--data.val_size", 7, "--trainer.max_epochs", -1),
)


@pytest.fixture
def train(supervised_command: Command, crash: Any, tmp_path: Path) -> Callable[..., Path]:
    """`train("sft", "run", 4, *options, strategy="fsdp")`: trains to step 4, on two ranks or in this process."""

    def run(kind: str, name: str, steps: int, *more: object, strategy: str | None = None) -> Path:
        root = ("--trainer.default_root_dir", tmp_path / name, "--trainer.max_steps", steps, "--ckpt_path", "last")
        words = supervised_command("fit", kind, *COMMON, *more, *root)
        if strategy is None:
            assert main(words) == 0
        else:
            log = tmp_path / f"{name}.log"
            crash.finish(crash.launch([*words, "--config", strategy, "--trainer.devices", "2"], log, ranks=2), log)
        return tmp_path / name

    return run


def logged(run: Path) -> list[dict[str, float]]:
    with (run / "version_0/metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def assert_same(run: Path, other: Path) -> dict[str, Any]:
    """Compares metrics, weights and optimizer states; returns the checkpoint of `run`."""
    for mine, others in zip(logged(run), logged(other), strict=True):
        assert mine == pytest.approx(others, rel=1e-3, abs=1e-5)
    ours, theirs = (torch.load(each / "latest/checkpoints/last.ckpt", weights_only=True) for each in (run, other))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, weight in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
    (left,), (right,) = (saved["optimizer_states"] for saved in (ours, theirs))
    assert left["state"].keys() == right["state"].keys() and left["state"]
    for number, state in right["state"].items():
        torch.testing.assert_close(left["state"][number], state, rtol=1e-3, atol=1e-4)
    return dict(ours)


@pytest.mark.slow
def test_reward_model_on_one_rank_then_sharded_on_two_then_on_one(train: Callable[..., Path], tmp_path: Path) -> None:
    unbroken = train("reward", "unbroken", 6)
    train("reward", "run", 2)
    run = train("reward", "run", 5, strategy="fsdp")  # resumes in the middle of an epoch and validates
    assert len(torch.load(run / "latest/checkpoints/last.ckpt", weights_only=True)["rlmt"]["random"]) == 2
    saved = assert_same(train("reward", "run", 6), unbroken)
    rows = logged(run)
    assert sum("rm/loss" in row for row in rows) == 6
    assert any({"val/accuracy", "val/accuracy/a", "val/calibration_error"} <= row.keys() for row in rows)
    assert saved["state_dict"]["attribute_head.weight"].abs().max() > 0
    assert (run / "version_0/calibration.png").is_file()  # drawn by the two ranks: no_plots patches this process only
    assert main(["export", str(run / "latest/checkpoints/last.ckpt"), str(tmp_path / "model")]) == 0
    assert (tmp_path / "model/model.safetensors").is_file()


@pytest.mark.slow
def test_sft_in_4_bits_with_ddp_equals_one_process(train: Callable[..., Path], tmp_path: Path) -> None:
    options = ("--model.lora", "LoRA", "--model.lora.rank", 4, "--model.quantization", "NF4")
    runs = [train("sft", name, 4, *options, strategy=strategy) for name, strategy in (("one", None), ("two", "ddp"))]
    saved = assert_same(runs[1], runs[0])
    assert all(".lora_" in name for name in saved["state_dict"])
    assert main(["export", str(runs[1] / "latest/checkpoints/last.ckpt"), str(tmp_path / "model")]) == 0
