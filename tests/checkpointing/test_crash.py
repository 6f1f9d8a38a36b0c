"""A run that is killed or stopped and then resumed equals, bit for bit, the run that was not."""

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
def unbroken(crash: Any, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted GRPO run: seven rollout batches with two optimizer steps each, five batches an epoch."""
    folder: Path = tmp_path_factory.mktemp("unbroken")
    run = dataclasses.replace(world, options=crash.ALGORITHMS["GRPO"])
    crash.finish(crash.launch(run.command(folder / "unbroken"), folder / "log"), folder / "log")
    return folder / "unbroken"


CASES = [
    "GRPO",
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in ("PPO with LoRA", "DPO with QLoRA", "GRPO with LoRA on 2 ranks")
    ),
]


@pytest.mark.parametrize("case", CASES)
def test_killed_run_resumes_as_the_unbroken_run(
    case: str, crash: Any, world: Any, unbroken: Path, tmp_path: Path, record_property: Any
) -> None:
    seed = int.from_bytes(os.urandom(4))  # each test run kills at another time; a failure reports the seed
    record_property("seed", seed)
    rng = random.Random(seed)
    algorithm, _, adapter = case.removesuffix(" on 2 ranks").partition(" with ")
    options = crash.ALGORITHMS[algorithm] + {"": (), "LoRA": crash.LORA, "QLoRA": crash.QLORA}[adapter]
    run, log = dataclasses.replace(world, options=options), tmp_path / "log"
    earliest = 1
    if "ranks" in case:  # the dropout states of the ranks differ only after some steps
        earliest = 4
        run = dataclasses.replace(run, ranks=2, configs=("ddp",))
    if adapter:
        unbroken = tmp_path / "unbroken"
        crash.finish(crash.launch(run.command(unbroken), log, ranks=run.ranks), log)
    broken = tmp_path / "broken"
    process = crash.launch(run.command(broken), log, ranks=run.ranks)
    crash.wait_for_steps(process, broken, rng.randint(earliest, 6))
    time.sleep(rng.uniform(0, 0.3))
    assert crash.kill(process, rng), (seed, log.read_text())
    crash.finish(crash.launch(run.command(broken, resume=True), log, ranks=run.ranks), log)
    outcome = crash.Outcome()
    crash.compare(unbroken, broken, outcome)
    assert outcome.samples == 7 * 16 and outcome.cells > 150 and outcome.tensors > 50, (seed, outcome)


SLURM = {
    **{"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"},
}


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGTERM", "SIGINT")), "SIGUSR1"]
)
def test_stopped_run_saves_a_checkpoint_and_resumes(
    name: str, crash: Any, world: Any, unbroken: Path, tmp_path: Path
) -> None:
    """SLURM sends SIGUSR1 before a preemption if a job requests it; the job is requeued."""
    number = signal.Signals[name]
    # The only checkpoint is the one that the signal causes.
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
    last = broken / "version_0" / "checkpoints" / "last.ckpt"
    step = torch.load(last, weights_only=True)["run"]["step"]
    assert f"rlmt: {name}: {last} has the first {step + 1} steps;" in log.read_text()
    assert [path.name for path in last.parent.iterdir() if path.name != "policy"] == ["last.ckpt"]
    if name == "SIGUSR1":
        assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    crash.finish(crash.launch(run.command(broken, resume=True), log, **environment), log)
    crash.compare(unbroken, broken, crash.Outcome())
