"""Conventions of Lightning applications, each with an effect that a run shows; docs/how-to/lightning.md lists them."""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from rlmt.cli import main
from rlmt.modules import RLMTModule

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "lightning.md").read_text(encoding="utf-8")


@pytest.fixture
def fit(tiny: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`fit(*options)`: a run of few tokens in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    options = {
        "--model.policy": tiny / "policy",
        "--model.reward": "LengthWindow",
        "--model.reward.min_chars": 5,
        "--model.reward.max_chars": 20,
        "--model.reward.margin": 40,
        "--model.format": "no_think",
        "--data.prompts": prompts_file,
        "--data.engine": "TransformersEngine",
        "--data.batch_size": 2,
        "--data.group_size": 2,
        "--data.max_prompt_tokens": 256,
        "--data.max_new_tokens": 4,
        "--data.val_size": 4,
        "--trainer.default_root_dir": "run",
        "--trainer.enable_progress_bar": "false",
        "--trainer.accelerator": "cpu",
    }
    words = [str(word) for pair in options.items() for word in pair]
    configs = ["--config", "base", "--config", "grpo", "--config", "tiny"]
    return lambda *more: main(["fit", *configs, *words, *map(str, more)])


@pytest.mark.usefixtures("no_plots")
def test_options_of_the_trainer_have_their_effect(
    fit: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[str, Any] = {}
    monkeypatch.setattr(TensorBoardLogger, "log_hyperparams", lambda logger, params: logged.update(params))
    trainer = ["--trainer.max_steps", 2, "--trainer.val_check_interval", 1, "--trainer.limit_val_batches", 1]
    extras = ["--trainer.callbacks+", "LearningRateMonitor", "--trainer.logger", "TensorBoardLogger"]
    assert fit(*trainer, *extras, "--trainer.logger.save_dir", "board", "--seed_everything", 7) == 0

    (log,) = tmp_path.rglob("metrics.csv")
    with log.open() as file:
        rows = list(csv.DictReader(file))
    skipped = [float(row["policy/skipped"]) for row in rows if row.get("policy/skipped")]
    assert skipped.count(0) == 2, "max_steps counts optimizer steps"
    assert sum(bool(row.get("val/reward_mean")) for row in rows) == len(skipped), "val_check_interval"
    assert any(row.get("lr-AdamW") for row in rows), "callbacks+ appends a callback of Lightning"
    assert list((tmp_path / "board").rglob("events.out.tfevents.*")), "a second logger"
    config = yaml.safe_load((log.parent / "config.yaml").read_text())
    assert config["seed_everything"] == 7, "the seed of the run"
    expected = {"model.algorithm.kl_coef": 0.001, "model.format": "no_think", "trainer.max_steps": 2}
    assert expected.items() <= logged.items(), "hyper-parameters are the configuration"

    (checkpoint,) = log.parent.rglob("last.ckpt")
    module = RLMTModule.load_from_checkpoint(checkpoint)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in module.state_dict().items())
    assert module.reward.max_chars == 20 and module.algorithm.dual_clip == 3.0


@pytest.mark.slow
def test_fast_dev_run_writes_no_files(fit: Callable[..., int], tmp_path: Path) -> None:
    assert fit("--trainer.fast_dev_run", "true") == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".csv", ".ckpt", ".png")]


def test_every_refused_habit_of_the_page_has_a_test() -> None:
    """tests/cli/test_lightning_habits.py and test_commands.py check their messages."""
    refused = re.findall(r"^\| (.*?) \| Refused", PAGE, re.MULTILINE)
    files = [Path(__file__).parent / f"test_{name}.py" for name in ("lightning_habits", "commands")]
    texts = "".join(file.read_text() for file in files)
    for options in refused:
        for option in re.findall(r"`(?:--)?([\w.]+)", options):
            assert option in texts, option
