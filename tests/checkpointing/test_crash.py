"""Runs that were killed or stopped and resumed are, bit for bit, the run that was not."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def world(crash: Any, tiny: Path, prompts_file: Path) -> Any:
    return crash.World(tiny / "policy", tiny / "reward", prompts_file, ())


@pytest.fixture(scope="module")
def whole(crash: Any, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run of GRPO with two optimizer steps on each of seven rollout batches, five a pass."""
    folder: Path = tmp_path_factory.mktemp("whole")
    run = dataclasses.replace(world, options=crash.ALGORITHMS["GRPO"])
    crash.finish(crash.launch(run.command(folder / "whole"), folder / "log"), folder / "log")
    return folder / "whole"


CASES = ["GRPO", "PPO with LoRA", "DPO with QLoRA", "GRPO with LoRA on 2 ranks"]


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_is_the_unbroken_run(
    case: str, crash: Any, world: Any, whole: Path, tmp_path: Path, record_property: Any
) -> None:
    seed = int.from_bytes(os.urandom(4))  # a new instant each time; the name of what fails has it
    record_property("seed", seed)
    dice = random.Random(seed)
    algorithm, _, adapter = case.removesuffix(" on 2 ranks").partition(" with ")
    options = crash.ALGORITHMS[algorithm] + {"": (), "LoRA": crash.LORA, "QLoRA": crash.QLORA}[adapter]
    run, log = dataclasses.replace(world, options=options), tmp_path / "log"
    least = 1
    if "ranks" in case:  # which for dropout draw apart, after some steps
        least = 4
        run = dataclasses.replace(run, ranks=2, configs=("ddp",))
    if adapter:
        whole = tmp_path / "whole"
        crash.finish(crash.launch(run.command(whole), log, ranks=run.ranks), log)
    broken = tmp_path / "broken"
    process = crash.launch(run.command(broken), log, ranks=run.ranks)
    crash.wait_for_steps(process, broken, dice.randint(least, 6))
    time.sleep(dice.uniform(0, 0.3))
    assert crash.kill(process, dice), (seed, log.read_text())
    crash.finish(crash.launch(run.command(broken, resume=True), log, ranks=run.ranks), log)
    outcome = crash.Outcome()
    crash.compare(whole, broken, outcome)
    assert outcome.samples == 7 * 16 and outcome.cells > 150 and outcome.tensors > 50, (seed, outcome)


SLURM = {
    **{"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"},
}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_stopped_run_saves_leaves_and_goes_on(name: str, crash: Any, world: Any, whole: Path, tmp_path: Path) -> None:
    """SIGUSR1 is what SLURM sends ahead of a preemption where a job asks for it; the job is queued again."""
    number = signal.Signals[name]
    # What the signal saves is the only checkpoint.
    run = dataclasses.replace(world, options=crash.ALGORITHMS["GRPO"], every_n_steps=1000)
    broken, log = tmp_path / "broken", tmp_path / "log"
    environment = {}
    if name == "SIGUSR1":
        tool = tmp_path / "bin" / "scontrol"
        tool.parent.mkdir()
        tool.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/requeued\n")
        tool.chmod(0o755)
        environment = SLURM | {"PATH": f"{tool.parent}:{os.environ['PATH']}"}
    process = crash.launch(run.command(broken), log, **environment)
    crash.wait_for_steps(process, broken, 2)
    os.kill(process.pids()[0], number)
    assert crash.wait(process) == 128 + number, log.read_text()
    last = broken / "checkpoints" / "last.ckpt"
    step = torch.load(last, weights_only=True)["run"]["step"]
    assert f"rlmt: {name}: {last} holds all up to step {step}" in log.read_text()
    assert [path.name for path in last.parent.iterdir() if path.name != "policy"] == ["last.ckpt"]
    if name == "SIGUSR1":
        assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    crash.finish(crash.launch(run.command(broken, resume=True), log, **environment), log)
    crash.compare(whole, broken, crash.Outcome())
