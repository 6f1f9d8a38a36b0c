"""Conventions of Lightning applications, each with an effect that a run shows; docs/how-to/lightning.md lists them."""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger

from rlmt.cli import main
from rlmt.cli.parsing import parse_integers_first
from rlmt.modules import RLMTModule

CONVENTION = re.compile(r"`[^`]+`")
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


Rows = list[dict[str, str]]


def rows_of(folder: Path) -> Rows:
    """Rows of the run's metrics.csv."""
    with (folder / "run" / "latest" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def trained(rows: Rows) -> int:
    """Number of logged training steps."""
    return sum(bool(row.get("reward/mean")) for row in rows)


def prompts_of(folder: Path) -> list[set[int]]:
    """Prompts of each training step."""
    files = sorted((folder / "run" / "latest" / "rollouts").glob("*.parquet"))
    samples = [row for file in files for row in pq.read_table(file, columns=["step", "prompt_index"]).to_pylist()]
    steps = sorted({row["step"] for row in samples})
    return [{row["prompt_index"] for row in samples if row["step"] == step} for step in steps]


Check = Callable[[Path, str], bool]
EFFECTS: dict[str, tuple[str, Check]] = {
    "limit_train_batches": (
        "--trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.max_steps -1",
        lambda folder, out: trained(rows_of(folder)) == 2,
    ),
    "max_epochs": (
        "--trainer.max_epochs 2 --trainer.limit_train_batches 1 --trainer.max_steps -1",
        lambda folder, out: [row["epoch"] for row in rows_of(folder) if row.get("reward/mean")] == ["0", "1"],
    ),
    "limit_val_batches": (
        "--trainer.max_steps 1 --trainer.val_check_interval 1 --trainer.limit_val_batches 0",
        lambda folder, out: not any(row.get("val/reward_mean") for row in rows_of(folder)),
    ),
    "log_every_n_steps": (
        "--trainer.max_epochs 1 --trainer.limit_train_batches 4 --trainer.log_every_n_steps 2",
        lambda folder, out: [row["step"] for row in rows_of(folder) if row.get("reward/mean")] == ["1", "3"],
    ),
    "max_time": (
        "--trainer.max_epochs 1 --trainer.limit_train_batches 5 --trainer.max_time 00:00:00:01",
        lambda folder, out: 1 <= trained(rows_of(folder)) < 5,
    ),
    "overfit_batches": (
        "--trainer.max_epochs 2 --trainer.overfit_batches 1",
        lambda folder, out: len(prompts_of(folder)) == 2 and prompts_of(folder)[0] == prompts_of(folder)[1],
    ),
    "profiler": (
        "--trainer.max_steps 1 --trainer.profiler simple",
        lambda folder, out: "run_training_epoch" in out,
    ),
    "enable_model_summary": (
        "--trainer.max_steps 1 --trainer.enable_model_summary true",
        lambda folder, out: "Total params" in out,
    ),
    "deterministic": (
        "--trainer.max_steps 1 --trainer.deterministic true",
        lambda folder, out: torch.are_deterministic_algorithms_enabled(),
    ),
    "default_root_dir": (
        "--trainer.max_steps 1 --trainer.default_root_dir elsewhere",
        lambda folder, out: (folder / "elsewhere" / "latest" / "metrics.csv").is_file(),
    ),
    "logger false": (
        "--trainer.max_steps 1 --trainer.logger false",
        lambda folder, out: trained(rows_of(folder)) == 1,
    ),
    "CSVLogger": (
        "--trainer.max_steps 1 --trainer.logger CSVLogger --trainer.logger.save_dir logs --trainer.logger.name mine",
        lambda folder, out: (folder / "logs" / "mine" / "version_0" / "checkpoints" / "last.ckpt").is_file(),
    ),
    "EarlyStopping": (
        "--trainer.max_epochs 1 --trainer.limit_train_batches 3 --trainer.val_check_interval 1 "
        "--trainer.callbacks+ EarlyStopping "
        "--trainer.callbacks.monitor val/reward_mean --trainer.callbacks.mode max "
        "--trainer.callbacks.stopping_threshold -100",
        lambda folder, out: trained(rows_of(folder)) == 1,
    ),
    "ModelCheckpoint": (
        "--trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.val_check_interval 1 "
        "--trainer.callbacks+ ModelCheckpoint "
        "--trainer.callbacks.monitor val/reward_mean --trainer.callbacks.mode max "
        "--trainer.callbacks.filename best-{step}",
        lambda folder, out: len(list(folder.rglob("best-step=*.ckpt"))) == 1,
    ),
    "TQDMProgressBar": (
        "--trainer.max_steps 1 --trainer.enable_progress_bar true --trainer.callbacks+ TQDMProgressBar",
        lambda folder, out: "Epoch 0" in out and "it/s" in out,
    ),
    "DeviceStatsMonitor": (
        "--trainer.max_steps 1 --trainer.callbacks+ DeviceStatsMonitor --trainer.callbacks.cpu_stats true",
        lambda folder, out: any(name.startswith("DeviceStatsMonitor") for name in rows_of(folder)[0]),
    ),
    "Timer": (
        "--trainer.max_epochs 20 --trainer.limit_train_batches 5 --trainer.callbacks+ Timer "
        "--trainer.callbacks.duration 00:00:00:01",
        lambda folder, out: 1 <= trained(rows_of(folder)) < 100,
    ),
}
"""Name in docs/how-to/lightning.md → options, and whether a run with them shows the effect."""


@pytest.mark.slow
@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("name", EFFECTS)
def test_convention_has_its_effect(
    name: str,
    fit: Callable[..., int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    options, check = EFFECTS[name]
    try:
        assert fit(*options.split()) == 0
        captured = capfd.readouterr()
        assert check(tmp_path, captured.out + captured.err + caplog.text), captured
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("1.0", 1.0), ("3", 3), ("0.5", 0.5)])
def test_batches_are_counted_by_integers_and_shares_are_floats(text: str, value: float) -> None:
    """`1` is one batch and `1.0` all of them, in whatever order libraries have written `Union[float, int]`."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--limit", type=Optional[Union[float, int]])  # noqa: UP007, UP045 - cached by Python
    parse_integers_first(parser)
    found = parser.parse_args(["--limit", text]).limit
    assert found == value and type(found) is type(value)


def test_printed_config_is_a_config(
    fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*args: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit, match="0"):
            main(["fit", *args, "--print_config"])
        return capsys.readouterr().out

    first = printed("-c", "base", "-c", "grpo", "-c", "tiny")
    (tmp_path / "mine.yaml").write_text(first)
    assert printed("--config", str(tmp_path / "mine.yaml")) == first


def test_page_and_effects_have_the_same_conventions() -> None:
    habits = " ".join(re.findall(r"^\| (.*?) \|", PAGE, re.MULTILINE))
    assert not [name for name in EFFECTS if name.split()[0] not in habits]
    assert len(CONVENTION.findall(habits)) >= 45


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
