"""The folders of runs: none is shared, none is left by a failed start, and `last` is a checkpoint of the same run."""

import csv
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from rlmt.checkpointing import ResumableCSVLogger
from rlmt.checkpointing.config_changes import same_run
from rlmt.checkpointing.last_checkpoint import last_checkpoint
from rlmt.cli import main

ONE_BATCH = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1")
"""Ends a run after a batch that may cause no update, because all its samples are malformed."""
README = Path(__file__).parents[2] / "README.md"


def overrides(tiny: Path, prompts_file: Path) -> list[str]:
    """Options that make an RL run a run of one step on tiny models."""
    options = {
        "--model.policy": tiny / "policy",
        "--model.reward.model": tiny / "reward",
        "--model.reward.dtype": "float32",
        "--model.gradient_checkpointing": "false",
        "--data.prompts": prompts_file,
        "--data.engine": "TransformersEngine",
        "--data.batch_size": 4,
        "--data.group_size": 2,
        "--data.max_prompt_tokens": 256,
        "--data.max_new_tokens": 8,
        "--data.val_size": 0,
        "--trainer.max_steps": 1,
        "--trainer.precision": "32-true",
        "--trainer.accelerator": "cpu",
        "--trainer.enable_progress_bar": "false",
    }
    return [str(word) for pair in options.items() for word in pair]


def saved(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def steps(run: Path) -> list[str]:
    with (run / "metrics.csv").open() as file:
        return [row["step"] for row in csv.DictReader(file) if row.get("reward/mean")]


@pytest.mark.slow
def test_readmes_pair_of_runs_leaves_two_checkpoints_of_two_formats(
    tiny: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_plots: None
) -> None:
    monkeypatch.chdir(tmp_path)
    section = README.read_text().partition("## Your own run")[2].partition("The second command")[0]
    pair = [line for line in re.sub(r" *\\\n *", " ", section).splitlines() if line.startswith("rlmt fit")]
    assert len(pair) == 2
    for line in pair:
        assert main([*shlex.split(line)[1:], *overrides(tiny, prompts_file), *ONE_BATCH]) == 0
    formats = {path: saved(path)["rlmt"]["format"]["name"] for path in Path("runs").glob("*/latest/checkpoints/*.ckpt")}
    assert sorted(formats.values()) == ["no_think", "think"]


@pytest.mark.slow
def test_runs_in_one_folder_keep_their_checkpoints_and_last_finds_the_same_run(
    tiny: Path,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_plots: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "run"
    common = ["--config", "base", "--config", "grpo", "--config", "tiny", *overrides(tiny, prompts_file)]
    common += ["--trainer.default_root_dir", str(root)]

    def fit(*more: str) -> int:
        return main(["fit", *common, *more])

    assert fit("--model.format", "no_think") == 0
    assert fit("--model.format", "think", *ONE_BATCH) == 0
    assert (root / "latest").resolve() == root / "version_1"
    assert {path.name for path in (root / "version_1").iterdir()} >= {"metrics.csv", "config.yaml", "checkpoints"}
    first = root / "version_0" / "checkpoints" / "last.ckpt"
    before = first.read_bytes()

    # Starts that fail leave no folder: before the Trainer starts, and in the first step.
    assert fit("--data.batch_size", "1000") == 2
    with pytest.raises(RuntimeError, match="broke"), monkeypatch.context() as patch:
        patch.setattr("rlmt.data.rollout_datamodule.generate", raise_error)
        patch.setattr("rlmt.errors._LIBRARIES", [Path("/")])  # no user's own code raised it
        fit("--model.format", "no_think", "--ckpt_path", str(first), "--trainer.max_steps", "2")
    assert sorted(os.listdir(root)) == ["latest", "version_0", "version_1"]
    assert (root / "latest").resolve() == root / "version_1" and first.read_bytes() == before

    # `last` resumes the run of the same format, although the other one is newer, in its own folder.
    assert fit("--model.format", "no_think", "--ckpt_path", "last", "--trainer.max_steps", "2") == 0
    assert saved(first)["global_step"] == 2 and steps(root / "version_0") == ["0", "1"]
    assert (root / "latest").resolve() == root / "version_0"
    assert len(steps(root / "version_1")) == 1

    # A run of another seed is another run; validation does not take the link.
    capsys.readouterr()
    assert main(["validate", *common, "--data.val_size", "2", "--model.format", "think", "--ckpt_path", "last"]) == 0
    assert (root / "version_2" / "metrics.csv").is_file() and (root / "latest").resolve() == root / "version_0"
    assert main(["validate", *common, "--seed_everything", "7", "--ckpt_path", "last"]) == 2
    assert "has no checkpoint of this run" in capsys.readouterr().err


def raise_error(*args: Any, **options: Any) -> None:
    raise RuntimeError("broke")


def test_run_with_a_fixed_checkpoint_folder_does_not_overwrite_another(
    tiny: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "last.ckpt").write_bytes(b"precious")
    command = ["fit", "--config", "base", "--config", "grpo", "--config", "tiny", *overrides(tiny, prompts_file)]
    callback = ["--trainer.callbacks", "PolicyCheckpoint", "--trainer.callbacks.dirpath", "kept"]
    assert main([*command, *callback]) == 2
    assert "kept/last.ckpt is the checkpoint of another run" in capsys.readouterr().err
    assert (tmp_path / "kept" / "last.ckpt").read_bytes() == b"precious"


CONFIG = {
    "seed_everything": 0,
    "model": {
        "class_path": "M",
        "init_args": {"policy": "p", "format": "think", "lr": 1.0, "algorithm": {"class_path": "A"}},
    },
}


def write_run(root: Path, version: int, time: int, **changed: Any) -> Path:
    """A run's folder with a checkpoint of a certain age; changed: options of the model."""
    checkpoint = root / f"version_{version}" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    os.utime(checkpoint, (time, time))
    (root / f"version_{version}" / "config.yaml").write_text(yaml.safe_dump(with_options(**changed)))
    return checkpoint


def with_options(**changed: Any) -> dict[str, Any]:
    model: Any = CONFIG["model"]
    return CONFIG | {"model": model | {"init_args": model["init_args"] | changed}}


def test_last_is_the_newest_with_equal_options_else_of_the_same_run(tmp_path: Path) -> None:
    equal_old = write_run(tmp_path, 0, 100)
    equal_new = write_run(tmp_path, 1, 200)
    changed = write_run(tmp_path, 2, 300, lr=2.0)
    write_run(tmp_path, 3, 400, format="no_think")
    write_run(tmp_path, 4, 400, algorithm={"class_path": "B"})
    assert last_checkpoint(tmp_path, with_options()) == equal_new != equal_old
    assert last_checkpoint(tmp_path, with_options(lr=3.0)) == changed
    assert last_checkpoint(tmp_path, with_options(format="zero_think")) is None
    assert last_checkpoint(tmp_path / "nowhere", with_options()) is None


@pytest.mark.parametrize(
    ("options", "same"),
    [({"lr": 2.0}, True), ({"policy": "q"}, False), ({"format": {"name": "think", "prefill": True}}, False)],
)
def test_runs_differ_in_model_and_format_and_not_in_the_learning_rate(options: dict[str, Any], same: bool) -> None:
    assert same_run(CONFIG, with_options(**options)) == same
    assert not same_run(CONFIG, CONFIG | {"seed_everything": 1})


def test_two_runs_that_start_at_once_get_two_folders(tmp_path: Path) -> None:
    first, second = ResumableCSVLogger(tmp_path), ResumableCSVLogger(tmp_path)
    assert (first.version, second.version) == (0, 1)
    second.finalize("failed")
    first.log_metrics({"loss": 1.0}, 0)
    first.keep(trained=True)
    first.finalize("failed")
    assert sorted(os.listdir(tmp_path)) == ["latest", "version_0"]
    assert ResumableCSVLogger(tmp_path).version == 1


def test_folder_exists_once_something_is_logged(tmp_path: Path) -> None:
    log = ResumableCSVLogger(tmp_path)
    assert log.version == 0 and not Path(log.log_dir).exists()
    log.log_metrics({"loss": 1.0}, 0)
    log.save()
    assert Path(log.log_dir, "metrics.csv").is_file()
    log.finalize("success")
    assert os.listdir(tmp_path) == ["version_0"]


def test_start_that_is_killed_leaves_no_folder_and_frees_its_number(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            ResumableCSVLogger(tmp_path).version  # noqa: B018 - reserves the number
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.listdir(tmp_path) == [".version_0"]
    log = ResumableCSVLogger(tmp_path)
    assert log.version == 0
    assert ResumableCSVLogger(tmp_path).version == 1  # the first one is alive
    log.finalize("failed")
    assert ResumableCSVLogger(tmp_path).version == 0


def test_other_ranks_create_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    assert ResumableCSVLogger(tmp_path).version == 0
    assert os.listdir(tmp_path) == []
