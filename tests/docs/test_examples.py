"""The Python files of the how-to guides run on tiny models."""

import csv
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from rlmt.cli import main

from .pages import ROOT, rlmt_arguments, shell_lines

HOW_TO = ROOT / "docs" / "how-to"
METRICS = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
OWN = {
    shlex.join(shlex.split(rlmt_arguments(line))[7:]): HOW_TO / f"{page}.md"
    for page in ("reward", "algorithm", "callback")
    for line in shell_lines(HOW_TO / f"{page}.md")
    if "my_" in line
}
"""Options after `fit --config base --config grpo --config tiny` that use a file of the reader's → their page."""


@pytest.fixture
def world(write_files: Callable[[Path], None], tiny: Path, tmp_path: Path) -> Callable[[Path], None]:
    """Writes the files of a page into a working folder that has runs/tiny, as `rlmt tiny` makes it."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(tiny)
    return write_files


def columns(path: Path) -> dict[str, list[str]]:
    """Values of metrics.csv by column."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows if row[name]] for name in rows[0]}


@pytest.mark.parametrize("options", OWN)
@pytest.mark.usefixtures("no_plots")
def test_own_classes_train(options: str, world: Callable[[Path], None], tmp_path: Path) -> None:
    world(OWN[options])
    small = {
        "--data.engine": "TransformersEngine",
        "--data.batch_size": 2,
        "--data.group_size": 4,
        "--data.max_prompt_tokens": 256,
        "--data.max_new_tokens": 8,
        "--data.val_size": 0,
        "--model.format": "no_think",
        "--trainer.max_steps": 1,
        "--trainer.default_root_dir": tmp_path / "run",
        "--trainer.enable_progress_bar": "false",
        "--trainer.accelerator": "cpu",
    }
    words = ["fit", "--config", "base", "--config", "grpo", "--config", "tiny", *shlex.split(options)]
    assert main([*words, *(str(word) for pair in small.items() for word in pair)]) == 0
    logged = columns(tmp_path / "run" / "version_0" / "metrics.csv")
    assert len(logged["policy/loss"]) == 1
    for name in re.findall(r"my_\w+\.(brevity|Mentions|QuestionRate)", options):
        column = {"QuestionRate": "thought/questions"}.get(name, f"reward/{name.lower()}")
        assert logged[column]


@pytest.mark.usefixtures("no_plots")
def test_python_script_trains_and_its_metrics_are_documented(world: Callable[[Path], None], tmp_path: Path) -> None:
    page = HOW_TO / "python.md"
    world(page)
    script = tmp_path / "train.py"
    assert sum(bool(line.strip()) for line in script.read_text(encoding="utf-8").splitlines()) <= 20
    runpy.run_path(str(script), run_name="__main__")
    (log,) = tmp_path.glob("runs/python/**/metrics.csv")
    assert (log.parent / "checkpoints" / "last.ckpt").is_file()
    documented = set(re.findall(r"`([a-z]+/[\w<>/]+)`", METRICS)) | {"epoch", "step", "reward/reward_model"}
    assert set(columns(log)) <= documented


def test_trackio_logger_of_the_page_receives_metrics_samples_and_configuration(
    write_files: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    from types import SimpleNamespace
    from typing import Any

    from rlmt.callbacks._logged_samples import SampleRow, log_samples

    calls: list[Any] = []
    run = SimpleNamespace(
        log=lambda metrics, step: calls.append((metrics, step)), finish=lambda: calls.append("finish")
    )
    # The package is not in the environment: a recorder with the signatures of its version 0.43.
    trackio: Any = SimpleNamespace(
        init=lambda project, config: calls.append((project, config)) or run, Table=lambda columns, data: (columns, data)
    )
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    write_files(HOW_TO / "watch.md")
    import my_loggers  # type: ignore[import-not-found]

    logger = my_loggers.TrackioLogger("mine")
    logger.log_hyperparams({"lr": 1.0})
    logger.log_metrics({"reward/mean": 2.0}, step=3)
    log_samples([logger], [SampleRow(0.5, "ok", "p", "t", "r")], 3)
    logger.finalize("success")
    columns = ["step", "reward", "status", "prompt", "thought", "response"]
    samples = {"samples": (columns, [[3, 0.5, "ok", "p", "t", "r"]])}
    assert calls == [("mine", {"lr": 1.0}), ({"reward/mean": 2.0}, 3), (samples, 3), "finish"]
