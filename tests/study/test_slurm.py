"""A study on SLURM, whose commands are faked: jobs are submitted, started again after preemption, and cancelled."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlmt.cli.commands import main

from .fake_slurm import install, read_jobs

pytestmark = pytest.mark.slow


def study(folder: Path, **stages: dict[str, Any]) -> list[str]:
    arms = {name: {"stage": name, "label": name.upper()} for name in stages}
    config = {"stages": stages, "arms": arms, "metrics": {"a": "a"}, "out": str(folder / "out"), "executor": "slurm"}
    config["resources"] = {"slurm_account": "team", "slurm_partition": "gpus", "mem_mb": 2000, "runtime": 30}
    (folder / "study.json").write_text(json.dumps(config))
    return ["study", "--config", str(folder / "study.json")]


def test_jobs_are_submitted_and_a_preempted_one_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in install(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    (tmp_path / "slurm/preempt").write_text("rule_big_wildcards_0")
    args = study(
        tmp_path,
        big={"run": "mini $dir --seed $seed", "resources": {"gpu": 8, "runtime": 960}},
        bad={"run": "nonsense"},
        after={"run": "--version", "needs": {"big": "big"}},
    )
    assert main([*args, "--jobs", "4"]) == 2
    error = capsys.readouterr().err
    assert "1 of 3 jobs did not finish: 'nonsense' is not a command" in error and "out/seed-0/bad/log.txt" in error

    jobs = {job["args"][job["args"].index("--comment") + 1].split("_")[1]: job for job in read_jobs(tmp_path / "slurm")}
    big = jobs["big"]["args"]
    assert {"--requeue", "gpus", "--gpus=8", "team", "2000"} <= set(big) and big[big.index("-t") + 1] == "960"
    assert jobs["after"]["args"][jobs["after"]["args"].index("-t") + 1] == "30"
    assert {name: (job["state"], job["starts"]) for name, job in jobs.items()} == {
        **{"big": ("COMPLETED", 2), "bad": ("FAILED", 1), "after": ("COMPLETED", 1)}
    }
    assert (tmp_path / "out/seed-0/big/log.txt").read_text().count("$ rlmt mini") >= 1
    state = json.loads((tmp_path / "out/seed-0/big/done").read_text())
    assert state["host"] and state["versions"]["torch"] and state["status"] == 0


def test_interrupted_study_cancels_its_jobs(tmp_path: Path) -> None:
    args = study(tmp_path, big={"run": "mini $dir --seed $seed"})
    environment = {**os.environ, **install(tmp_path / "slurm")}
    process = subprocess.Popen([sys.executable, "-m", "rlmt", *args], env=environment)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("out/seed-0/big/log.txt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    (job,) = read_jobs(tmp_path / "slurm")
    assert job["state"] == "CANCELLED"
