"""Kills a real run with SIGKILL at random times, resumes it, and compares it bit for bit with an uninterrupted run.

    python benchmarks/crash.py --kills 20 [--algorithm PPO] [--lora | --qlora] [--engine VLLMEngine] [--start exec]
    python benchmarks/crash.py --kills 20 --ranks 2 [--config ddp] …

Every step writes a checkpoint, so many kills interrupt a write. The time of a kill is uniform over the duration of a
run, including start-up. With several ranks, either all ranks are killed at once, or one rank first and the others a
little later, as a launcher does. A run that ends before its next kill is compared, and a new run takes the remaining
kills. The comparison of a completed run covers every cell of metrics.csv except times, every sample of the rollout
files, and in the last checkpoint the weights, the optimizer, the scheduler, random states, counters and the position in
the prompts.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

LORA = ("--model.lora", "LoRA", "--model.lora.rank", "8", "--model.lora.dropout", "0.1")
QLORA = (
    *("--model.lora", "LoRA", "--model.lora.rank", "8", "--model.quantization", "NF4"),
    *("--model.optimizer", "bitsandbytes.optim.AdamW8bit", "--model.optimizer.min_8bit_size", "256"),
)
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "GRPO": ("--model.algorithm.minibatches", "2", "--model.scheduler", "LinearLR"),
    "PPO": (
        *("--model.algorithm", "PPO", "--model.algorithm.minibatches", "2", "--model.algorithm.critic_lr", "1e-3"),
        *("--model.algorithm.kl_placement", "reward", "--model.algorithm.kl_coef", "0.1"),
        *("--model.algorithm.target_kl", "0.05", "--model.algorithm.kl_horizon", "20"),
    ),
    "DPO": (
        *("--model.algorithm", "DPO", "--model.algorithm.minibatches", "2", "--model.algorithm.min_valid", "2"),
        *("--model.scheduler", "CosineWithWarmup"),
    ),
    "DAPO": ("--model.algorithm", "DAPO", "--model.algorithm.minibatches", "2"),
}
"""Two optimizer steps per rollout batch, so that some kills fall between them; PPO has an adaptive KL coefficient."""
KILLED = -signal.SIGKILL


class Process(Protocol):
    """A started run."""

    def poll(self) -> int | None:
        """Returns the exit status, negative for a signal; None while the run is active."""

    def pids(self) -> list[int]:
        """Returns the ids of its processes, rank 0 first."""


class CommandLineRun(subprocess.Popen[bytes]):
    """A run started as from a shell; Lightning starts the other ranks."""

    def pids(self) -> list[int]:
        """Returns the ids of its processes, rank 0 first."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [self.pid, *map(int, children.read_text().split() if children.exists() else ())]


class ForkedRun:
    """A run in a process forked from one that has imported all modules, which saves seconds per start."""

    def __init__(self, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rlmt.cli.lightning_cli", "rlmt.callbacks", "rlmt.modules"])
        self._process = context.Process(target=run_in_this_process, args=(list(words), str(log), dict(environment)))
        self._process.start()

    def poll(self) -> int | None:
        """Returns the exit status, negative for a signal; None while the run is active."""
        return self._process.exitcode

    def pids(self) -> list[int]:
        """Returns the id of the only process."""
        assert self._process.pid is not None
        return [self._process.pid]


class RankedRun:
    """A run whose ranks are started one by one, as torchrun does."""

    def __init__(self, words: Sequence[str], log: Path, environment: Mapping[str, str], count: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "GROUP_RANK": "0"}
        shared |= {"TORCHELASTIC_RUN_ID": "crash", "LOCAL_WORLD_SIZE": str(count)} | dict(environment)
        ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count))
        self._ranks = [ForkedRun(words, log, shared | rank) for rank in ranks]

    def poll(self) -> int | None:
        """Returns the exit status, that of a killed rank if there is one; None while any rank is active."""
        codes = [rank.poll() for rank in self._ranks]
        return None if None in codes else min(codes, key=lambda code: (code != KILLED, code == 0))

    def pids(self) -> list[int]:
        """Returns the ids of its processes, rank 0 first."""
        return [pid for rank in self._ranks for pid in rank.pids()]


def run_in_this_process(words: list[str], log: str, environment: dict[str, str]) -> None:
    """Runs the command in this process and redirects its output to a file."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores SIGINT
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from rlmt.cli.commands import main

    raise SystemExit(main(words))


def launch(words: Sequence[str], log: Path, start: str = "fork", ranks: int = 1, **environment: str) -> Process:
    """Starts `rlmt …`; `exec` as from a shell, `fork` from a process with all imports."""
    if start == "fork":
        return RankedRun(words, log, environment, ranks) if ranks > 1 else ForkedRun(words, log, environment)
    with log.open("ab") as file:
        command = [sys.executable, "-m", "rlmt", *words]
        return CommandLineRun(command, stdout=file, stderr=file, env=os.environ | environment)


def wait(process: Process, seconds: float | None = None) -> int | None:
    """Waits for the run and returns its exit status, or None after the given number of seconds."""
    end = None if seconds is None else time.monotonic() + seconds
    while process.poll() is None and (end is None or time.monotonic() < end):
        time.sleep(0.002)
    return process.poll()


@dataclass(frozen=True)
class World:
    """Models, prompts and options that all runs share."""

    policy: Path
    reward: Path
    prompts: Path
    options: tuple[str, ...]
    every_n_steps: int = 1
    """Optimizer steps between checkpoints."""
    ranks: int = 1
    configs: tuple[str, ...] = ()
    """Additional shipped configs, such as a strategy for several ranks."""

    def command(self, run: Path, resume: bool = False) -> list[str]:
        """Returns the arguments of `rlmt fit` with a folder for the run."""
        run.parent.mkdir(parents=True, exist_ok=True)
        callbacks = run.parent / "callbacks.yaml"
        callbacks.write_text(
            "trainer: {callbacks: [{class_path: rlmt.callbacks.RewardCurves, init_args: {every_n_steps: 0}},"
            " {class_path: rlmt.callbacks.PolicyHealth}, {class_path: rlmt.callbacks.SampleTable,"
            " init_args: {dump_every_n_steps: 3, every_n_steps: 0}},"
            f" {{class_path: rlmt.callbacks.PolicyCheckpoint, init_args: {{every_n_steps: {self.every_n_steps}}}}}]}}"
        )
        options = {
            "--model.policy": self.policy,
            "--model.reward.model": self.reward,
            "--model.format": "no_think",
            "--model.tokens_per_micro_batch": 256,
            "--data.prompts": self.prompts,
            "--data.engine": "TransformersEngine",
            "--data.batch_size": 4,
            "--data.group_size": 4,
            "--data.max_prompt_tokens": 256,
            "--data.max_new_tokens": 12,
            "--data.val_size": 4,
            "--trainer.val_check_interval": 3,
            "--trainer.max_steps": 14,
            "--trainer.default_root_dir": run,
            "--trainer.enable_progress_bar": "false",
        }
        configs = [word for name in ("base", "grpo", "tiny", *self.configs) for word in ("--config", name)]
        if self.ranks > 1:
            options |= {"--trainer.accelerator": "cpu", "--trainer.devices": self.ranks}
        words = ["fit", *configs, "--config", str(callbacks), *(str(word) for pair in options.items() for word in pair)]
        return [*words, *self.options, *(["--ckpt_path", "last"] if resume else [])]


@dataclass
class Outcome:
    """Counts of kills, runs and compared values."""

    kills: int = 0
    runs: int = 0
    cells: int = 0
    tensors: int = 0
    samples: int = 0

    def row(self, name: str) -> str:
        """Returns the counts as a row of a Markdown table."""
        return f"| {name} | {self.kills} | {self.runs} | {self.cells:,} | {self.tensors:,} | {self.samples:,} | 0 |"


HEADER = (
    "| run | kills | compared runs | logged values | tensors | samples | differences |\n|---|---|---|---|---|---|---|"
)


def crash(world: World, folder: Path, kills: int, seed: int, start: str = "fork") -> Outcome:
    """Kills and resumes runs until the number of kills is reached, and compares each completed run.

    Args:
        world: Models, prompts and options of the runs.
        folder: Folder for all runs.
        kills: Number of kills.
        seed: Seed of the times of the kills.
        start: `fork` or `exec`, see `launch`.

    Returns:
        The counts.

    Raises:
        AssertionError: A resumed run differs from the uninterrupted one, or a start failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng, log, reference = random.Random(seed), folder / "log.txt", folder / "reference"
    finish(launch(world.command(reference), log, start, world.ranks), log)  # a warm-up run, which fills caches
    began = time.monotonic()
    finish(launch(world.command(reference), log, start, world.ranks), log)
    duration = time.monotonic() - began
    outcome = Outcome()
    while outcome.kills < kills:
        run = folder / f"interrupted{outcome.runs}"
        ended = False
        while not ended:
            process = launch(world.command(run, resume=True), log, start, world.ranks)
            if outcome.kills < kills and wait(process, rng.uniform(0, duration)) is None:
                outcome.kills += kill(process, rng)
            else:
                finish(process, log)
            ended = process.poll() == 0
        outcome.runs += 1
        compare(reference, run, outcome)
    return outcome


def wait_for_steps(process: Process, run: Path, count: int) -> None:
    """Waits until a run has logged the given number of steps, or has ended."""
    table = run / "version_0" / "metrics.csv"
    while process.poll() is None and not (table.exists() and len(table.read_bytes().splitlines()) > count):
        time.sleep(0.002)


def kill(process: Process, rng: random.Random | None = None) -> bool:
    """Kills all ranks of a run at once, or at random one rank first and the others later, as a launcher does.

    Args:
        process: The run.
        rng: Random number generator; None kills all ranks at once.

    Returns:
        Whether the run was still active.
    """
    pids = process.pids()
    if rng is not None and len(pids) > 1 and rng.random() < 0.5:
        kill_all([rng.choice(pids)])
        wait(process, rng.uniform(0, 3))
    kill_all(pids)
    return wait(process) == KILLED


def kill_all(pids: Sequence[int]) -> None:
    """Kills the processes that still exist."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def finish(process: Process, log: Path) -> None:
    """Waits for a run and checks that its exit status is 0."""
    assert wait(process) == 0, log.read_text()[-4000:]


def compare(reference: Path, resumed: Path, outcome: Outcome) -> None:
    """Raises AssertionError if two runs differ, and counts the compared values."""
    folders = [run / f"version_{checkpoint(run)['run']['version']}" for run in (reference, resumed)]
    rows, others = map(metrics, folders)
    assert rows == others, first_difference(rows, others)
    outcome.cells += sum(map(len, rows))
    samples_a, samples_b = (samples(folder / "rollouts") for folder in folders)
    assert samples_a == samples_b, f"{resumed}: the samples differ"
    outcome.samples += len(samples_a)
    states = [flatten(comparable(checkpoint(run))) for run in (reference, resumed)]
    assert states[0].keys() == states[1].keys(), states[0].keys() ^ states[1].keys()
    for name, value in states[0].items():
        assert bit_equal(value, states[1][name]), f"{resumed}: {name} differs: {value} and {states[1][name]}"
    outcome.tensors += sum(hasattr(value, "dtype") for value in states[0].values())


def metrics(folder: Path) -> list[dict[str, str]]:
    """Returns the rows of metrics.csv as text, without times."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in csv.DictReader(file)]


def samples(folder: Path) -> list[str]:
    """Returns all samples of a run, rank by rank, as text, because NaN does not equal itself."""
    from rlmt.engines.rollout_files import read_rollouts

    return [repr(row) for row in sorted(read_rollouts(folder).to_pylist(), key=itemgetter("rank", "step"))]


def checkpoint(run: Path) -> dict[str, Any]:
    """Returns the contents of a run's last checkpoint."""
    import torch

    loaded: dict[str, Any] = torch.load(run / "latest" / "checkpoints" / "last.ckpt", weights_only=True)
    return loaded


def comparable(loaded: dict[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint without paths and folder version, which changes if a run is killed before its first step."""
    for name in ("config", "run"):
        del loaded[name]
    # Counters of the loader and of validation differ; the data module stores the position in the prompts.
    loops = loaded["loops"]["fit_loop"]
    loops["state_dict"].pop("combined_loader")
    loaded["loops"] = {name: state for name, state in loops.items() if "val_loop" not in name}
    return loaded


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Flattens nested dicts and lists to a dict of path → leaf."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None:
        return {name: value}
    return {k: v for key, inner in items for k, v in flatten(inner, f"{name}/{key}").items()}


def bit_equal(one: Any, other: Any) -> bool:
    """Whether two leaves have the same bits; NaN equals NaN."""
    import torch

    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
    return bool(one == other or (one != one and other != other))


def first_difference(rows: list[dict[str, str]], others: list[dict[str, str]]) -> str:
    """Describes the first row that differs."""
    for row, other in zip(rows, others, strict=False):
        if row != other:
            return f"step {row['step']}: " + str({k: (v, other.get(k)) for k, v in row.items() if v != other.get(k)})
    return f"{len(rows)} and {len(others)} rows: steps {[r['step'] for r in rows]} and {[r['step'] for r in others]}"


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills")
    parser.add_argument("--algorithm", choices=list(ALGORITHMS), default="GRPO")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--qlora", action="store_true")
    parser.add_argument("--engine", default="TransformersEngine")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--config", default="ddp", help="config with the strategy for several ranks")
    parser.add_argument(
        "--start", choices=("fork", "exec"), default="fork", help="exec starts a new interpreter for each run"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
    args = parser.parse_args()
    from rlmt.demos.tiny import write_tiny
    from rlmt.demos.tiny_models import Sizes

    with tempfile.TemporaryDirectory(prefix="rlmt-crash-") as folder:
        tiny = Path(folder, "tiny")
        write_tiny(tiny, sizes=Sizes(hidden=64, layers=2, heads=2, ffn=128, vocab=512, context=1024))
        prompts = Path(folder, "prompts.jsonl")
        prompts.write_text("\n".join((tiny / "prompts.jsonl").read_text().splitlines()[::16]) + "\n")
        adapter = QLORA if args.qlora else LORA if args.lora else ()
        options = (*ALGORITHMS[args.algorithm], *adapter, "--data.engine", args.engine)
        began = time.monotonic()
        strategy = (args.config,) if args.ranks > 1 else ()
        world = World(tiny / "policy", tiny / "reward", prompts, options, ranks=args.ranks, configs=strategy)
        outcome = crash(world, Path(folder, "runs"), args.kills, args.seed, args.start)
        name = args.algorithm + (", QLoRA" if args.qlora else ", LoRA" if args.lora else "")
        name += f", {args.engine}" + f", {args.ranks} ranks ({args.config})" * bool(strategy)
        print(HEADER, outcome.row(name), f"\n{time.monotonic() - began:.0f} s, starts by {args.start}", sep="\n")


if __name__ == "__main__":
    main()
