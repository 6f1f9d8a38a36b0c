"""`rlmt runs`: which folders are runs, and what the table says of each."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from rlmt.cli import main
from rlmt.cli.runs import age, runs_table
from rlmt.report.run_states import find_runs, lock_run, read_rows


def write_run(folder: Path, rows: list[str], updated: float, **state: Any) -> Path:
    """A run's folder with these lines of metrics.csv and, if it is given, a state file."""
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("\n".join([*rows, ""]))
    os.utime(folder / "metrics.csv", (updated, updated))
    if state:
        record = {"step": 0, "steps": None, "updated": updated, "error": None} | state
        (folder / "state.json").write_text(json.dumps(record))
    return folder


RL = ["step,reward/mean,length/thought_mean,val/reward_mean", "0,1.5,10,", "1,2.5,12.25,", "1,,,3.75", "2,3.5,20,"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four runs, a validation, and what is no run."""
    now, root = time.time(), tmp_path / "runs"
    write_run(root / "rl" / "version_0", RL, now - 90, state="finished", step=3, steps=3)
    write_run(root / "rl" / "version_1", ["step,reward/mean", "0,nan"], now - 7300, state="running", step=1, steps=9)
    failed = {"state": "failed", "step": 2, "steps": 9, "error": "--data.prompts p: [bold]the disk[/] is full."}
    write_run(root / "sft", ["step,sft/loss", "0,2", "1,1.25"], now - 7200 * 24, **failed)
    write_run(root / "old" / "version_0", ["step,rm/loss,rm/accuracy", "0,0.7,0.5", "1,0.6,0.75"], now - 3)
    write_run(root / "rl" / "version_2", ["step,val/reward_mean", "0,3"], now)
    (root / "rl" / "latest").symlink_to("version_0")
    (root / "rl" / "version_0" / "checkpoints").mkdir()
    (root / "tiny" / "policy").mkdir(parents=True)
    return root


def cells(root: Path) -> list[list[str]]:
    table = runs_table(find_runs(root), root)
    return [list(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]


def test_table_has_the_training_runs_newest_first(root: Path) -> None:
    assert cells(root) == [
        ["old/version_0", "–", "2", "accuracy 0.75", "", "", "3 s"],
        ["rl/version_0", "finished", "3 of 3", "3.75 val", "20", "", "1 min"],
        ["rl/version_1", "interrupted", "1 of 9", "nan", "", "", "2 h"],
        ["sft", "failed", "2 of 9", "loss 1.25", "", "--data.prompts p: [bold]the disk[/] is full.", "2 d"],
    ]


def test_table_of_another_program_does_not_hide_runs(root: Path) -> None:
    (root / "other").mkdir()
    (root / "other" / "metrics.csv").write_text("name,value\naccuracy,0.5\n")
    assert {"old/version_0", "rl/version_0"} <= {row[0] for row in cells(root)}
    assert read_rows(root / "other" / "metrics.csv") == [{"value": 0.5}]


def test_verdict_names_the_checks_that_found_the_worst_state(tmp_path: Path) -> None:
    header = "step,reward/mean,reward/malformed,length/truncated,policy/kl"
    rows = [header, *(f"{n},{n},{0.5},{0.3},{0.2}" for n in range(12))]
    sick = write_run(tmp_path / "sick", rows, time.time())
    healthy = write_run(tmp_path / "healthy", [header, *(f"{n},{n},0,0,0.01" for n in range(12))], time.time())
    early = write_run(tmp_path / "early", rows[:4], time.time())
    verdict = {run.folder: run.verdict for run in find_runs(tmp_path)}
    assert verdict == {sick: "problem: Malformed samples, Truncated samples", healthy: "ok", early: ""}


def test_locked_run_is_running(root: Path) -> None:
    lock = lock_run(root / "rl" / "version_1")
    assert [row[1] for row in cells(root)] == ["–", "finished", "running", "failed"]
    os.close(lock)
    assert [row[1] for row in cells(root)] == ["–", "finished", "interrupted", "failed"]


def test_command_prints_the_table_and_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(root / "rl")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "step", "reward", "thought", "verdict", "age"]
    assert [line.split()[0] for line in lines[1:]] == ["version_0", "version_1"]
    assert main(["runs", str(root), "--json"]) == 0
    found = {Path(run["folder"]).name: run for run in json.loads(capsys.readouterr().out)}
    assert found["version_1"]["reward"] == {"metric": "reward/mean", "value": None}, "JSON has no NaN"
    assert found["sft"]["state"] == "failed" and found["sft"]["loss"]["value"] == 1.25


def test_watch_refreshes_until_interrupted(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    sleeps: list[float] = []

    def wait(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 2:
            raise KeyboardInterrupt
        write_run(root / "new", RL, time.time(), state="finished", step=3, steps=3)

    monkeypatch.setattr("rlmt.cli.runs.time.sleep", wait)
    assert main(["runs", str(root), "--watch"]) == 0
    _, first, second, *_ = capsys.readouterr().out.split("verdict")
    assert "new" not in first and "new" in second


def test_folders_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0 and "no training runs yet" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "none: no such folder; pass the folder of your runs." in capsys.readouterr().err
    assert main(["runs", str(tmp_path), "--watch"]) == 2
    assert "--watch: the output is not a terminal" in capsys.readouterr().err


def test_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,reward/mean\n0,1.5\n1,2.2")
    assert read_rows(path) == [{"step": 0, "reward/mean": 1.5}]
    path.write_text("step,reward/mean\n0,1.5\n1\n2,3\n")
    assert [row["step"] for row in read_rows(path)] == [0, 2]


def test_age_is_in_one_unit() -> None:
    assert [age(s) for s in (-1, 59.9, 60, 3599, 7200, 86400 * 3)] == ["0 s", "59 s", "1 min", "59 min", "2 h", "3 d"]
