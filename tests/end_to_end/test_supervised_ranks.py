"""SFT and reward models on two processes as a user runs them, and on from there on other numbers of them."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlmt.cli.commands import main

pytestmark = pytest.mark.usefixtures("no_pictures")
Command = Callable[..., list[str]]
# SGD, which rounding errors in small gradients do not sway, but which has a state.
COMMON = (
    *("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", 0.3, "--model.optimizer.momentum", 0.9),
    *("--model.scheduler", "null", "--data.val_size", 7, "--trainer.max_epochs", -1),
)


@pytest.fixture
def train(supervised_command: Command, crash: Any, tmp_path: Path) -> Callable[..., Path]:
    """`train("sft", "run", 4, *options, spread="fsdp")`: up to step 4, on two processes or on this one."""

    def run(kind: str, name: str, steps: int, *more: object, spread: str | None = None) -> Path:
        root = ("--trainer.default_root_dir", tmp_path / name, "--trainer.max_steps", steps, "--ckpt_path", "last")
        words = supervised_command("fit", kind, *COMMON, *more, *root)
        if spread is None:
            assert main(words) == 0
        else:
            log = tmp_path / f"{name}.log"
            crash.finish(crash.launch([*words, "--config", spread, "--trainer.devices", "2"], log, ranks=2), log)
        return tmp_path / name

    return run


def logged(run: Path) -> list[dict[str, float]]:
    with (run / "version_0/metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def assert_same(run: Path, other: Path) -> dict[str, Any]:
    """Logs, weights and moments; gives the first one's checkpoint."""
    for mine, others in zip(logged(run), logged(other), strict=True):
        assert mine == pytest.approx(others, rel=1e-3, abs=1e-5)
    ours, theirs = (torch.load(each / "checkpoints/last.ckpt", weights_only=True) for each in (run, other))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, weight in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
    (left,), (right,) = (saved["optimizer_states"] for saved in (ours, theirs))
    assert left["state"].keys() == right["state"].keys() and left["state"]
    for number, state in right["state"].items():
        torch.testing.assert_close(left["state"][number], state, rtol=1e-3, atol=1e-4)
    return dict(ours)


def test_a_reward_model_on_one_process_then_in_shards_on_two_then_on_one(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    whole = train("reward", "whole", 6)
    train("reward", "run", 2)
    run = train("reward", "run", 5, spread="fsdp")  # validates on its way, in the middle of which it goes on
    assert len(torch.load(run / "checkpoints/last.ckpt", weights_only=True)["rlmt"]["random"]) == 2
    saved = assert_same(train("reward", "run", 6), whole)
    rows = logged(run)
    assert sum("rm/loss" in row for row in rows) == 6
    assert any({"val/accuracy", "val/accuracy/a", "val/calibration_error"} <= row.keys() for row in rows)
    assert saved["state_dict"]["attribute_head.weight"].abs().max() > 0
    assert (run / "version_0/calibration.png").is_file()  # which this process draws none of
    assert main(["export", str(run / "checkpoints/last.ckpt"), str(tmp_path / "model")]) == 0
    assert (tmp_path / "model/model.safetensors").is_file()


def test_sft_in_4_bits_on_two_whole_models(train: Callable[..., Path], tmp_path: Path) -> None:
    options = ("--model.lora", "LoRA", "--model.lora.rank", 4, "--model.quantization", "NF4")
    runs = [train("sft", name, 4, *options, spread=spread) for name, spread in (("one", None), ("two", "ddp"))]
    saved = assert_same(runs[1], runs[0])
    assert all(".lora_" in name for name in saved["state_dict"])
    assert main(["export", str(runs[1] / "checkpoints/last.ckpt"), str(tmp_path / "model")]) == 0
