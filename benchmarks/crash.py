"""Kills a real run with SIGKILL at random instants, resumes it, and compares it bit for bit with the unbroken run.

    python benchmarks/crash.py --kills 20 [--algorithm PPO] [--lora | --qlora] [--engine VLLMEngine] [--start exec]
    python benchmarks/crash.py --kills 20 --ranks 2 [--config ddp] …

Every step is checkpointed, so that many kills fall into the writing of one. An instant is drawn evenly from the whole
time that a run takes, start-up included. Of several ranks all are killed at once, or one alone and the others a little
later, as a launcher does. A run that ends before its next kill is compared, and another one takes the rest of the
kills. What is compared, when a broken run has come to its end: every cell of metrics.csv but the times, every sample of
the rollout files, and in the last checkpoint weights, optimizer, schedule, random states, counters and where the
prompts stand.
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
"""Two optimizer steps on each rollout batch, so that kills fall between them; in PPO a steered KL coefficient."""
KILLED = -signal.SIGKILL


class Process(Protocol):
    """A run that has been started."""

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""

    def pids(self) -> list[int]:
        """Its processes, rank 0 first."""


class Started(subprocess.Popen[bytes]):
    """A run as from a shell; Lightning starts its other ranks."""

    def pids(self) -> list[int]:
        """Its processes, rank 0 first."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [self.pid, *map(int, children.read_text().split() if children.exists() else ())]


class Forked:
    """A run in a process forked from one that has imported everything: the same command, seconds earlier."""

    def __init__(self, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rlmt.cli.lightning_cli", "rlmt.callbacks", "rlmt.modules"])
        self._process = context.Process(target=run_here, args=(list(words), str(log), dict(environment)))
        self._process.start()

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def pids(self) -> list[int]:
        """The one process."""
        assert self._process.pid is not None
        return [self._process.pid]


class Together:
    """Ranks that were started one by one, as torchrun does."""

    def __init__(self, words: Sequence[str], log: Path, environment: Mapping[str, str], count: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "GROUP_RANK": "0"}
        shared |= {"TORCHELASTIC_RUN_ID": "crash", "LOCAL_WORLD_SIZE": str(count)} | dict(environment)
        ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count))
        self._ranks = [Forked(words, log, shared | rank) for rank in ranks]

    def poll(self) -> int | None:
        """Exit status, that of a killed rank where there is one; None while one runs."""
        codes = [rank.poll() for rank in self._ranks]
        return None if None in codes else min(codes, key=lambda code: (code != KILLED, code == 0))

    def pids(self) -> list[int]:
        """Its processes, rank 0 first."""
        return [pid for rank in self._ranks for pid in rank.pids()]


def run_here(words: list[str], log: str, environment: dict[str, str]) -> None:
    """Runs the command in this process, its output in a file."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the process that this one is forked from ignores it
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from rlmt.cli.commands import main

    raise SystemExit(main(words))


def launch(words: Sequence[str], log: Path, start: str = "fork", ranks: int = 1, **environment: str) -> Process:
    """Starts `rlmt …`: `exec` as from a shell, `fork` without importing anew."""
    if start == "fork":
        return Together(words, log, environment, ranks) if ranks > 1 else Forked(words, log, environment)
    with log.open("ab") as file:
        command = [sys.executable, "-m", "rlmt", *words]
        return Started(command, stdout=file, stderr=file, env=os.environ | environment)


def wait(process: Process, seconds: float | None = None) -> int | None:
    """Exit status, or None if it still runs after so many seconds."""
    end = None if seconds is None else time.monotonic() + seconds
    while process.poll() is None and (end is None or time.monotonic() < end):
        time.sleep(0.002)
    return process.poll()


@dataclass(frozen=True)
class World:
    """Which models and prompts the runs are on, and what they have in common."""

    policy: Path
    reward: Path
    prompts: Path
    options: tuple[str, ...]
    every_n_steps: int = 1
    """Optimizer steps between checkpoints."""
    ranks: int = 1
    configs: tuple[str, ...] = ()
    """Shipped configs on top, such as the one that spreads a run over ranks."""

    def command(self, run: Path, resume: bool = False) -> list[str]:
        """Words of `rlmt fit` into a folder."""
        run.parent.mkdir(parents=True, exist_ok=True)
        often = run.parent / "often.yaml"
        often.write_text(
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
        words = ["fit", *configs, "--config", str(often), *(str(word) for pair in options.items() for word in pair)]
        return [*words, *self.options, *(["--ckpt_path", "last"] if resume else [])]


@dataclass
class Outcome:
    """What came of it."""

    kills: int = 0
    runs: int = 0
    cells: int = 0
    tensors: int = 0
    samples: int = 0

    def row(self, name: str) -> str:
        """A line of a markdown table."""
        return f"| {name} | {self.kills} | {self.runs} | {self.cells:,} | {self.tensors:,} | {self.samples:,} | 0 |"


HEADER = (
    "| run | kills | broken runs | logged values | tensors | samples | differences |\n|---|---|---|---|---|---|---|"
)


def crash(world: World, folder: Path, kills: int, seed: int, start: str = "fork") -> Outcome:
    """Kills runs until there were so many kills, and compares each when it has come to its end.

    Args:
        world: what to run.
        folder: where; everything stays there.
        kills: how many.
        seed: of the instants.
        start: `fork` or `exec`, see `launch`.

    Raises:
        AssertionError: a broken run is not the unbroken one, or a start failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dice, log, whole = random.Random(seed), folder / "log.txt", folder / "whole"
    finish(launch(world.command(whole), log, start, world.ranks), log)  # once to warm up: the first fills caches
    began = time.monotonic()
    finish(launch(world.command(whole), log, start, world.ranks), log)
    lasts = time.monotonic() - began
    outcome = Outcome()
    while outcome.kills < kills:
        run = folder / f"broken{outcome.runs}"
        ended = False
        while not ended:
            process = launch(world.command(run, resume=True), log, start, world.ranks)
            if outcome.kills < kills and wait(process, dice.uniform(0, lasts)) is None:
                outcome.kills += kill(process, dice)
            else:
                finish(process, log)
            ended = process.poll() == 0
        outcome.runs += 1
        compare(whole, run, outcome)
    return outcome


def wait_for_steps(process: Process, run: Path, count: int) -> None:
    """Waits until a run has logged so many steps, or has ended."""
    table = run / "version_0" / "metrics.csv"
    while process.poll() is None and not (table.exists() and len(table.read_bytes().splitlines()) > count):
        time.sleep(0.002)


def kill(process: Process, dice: random.Random | None = None) -> bool:
    """Kills all ranks of a run; as the dice fall, one alone first, and the others later, as a launcher does.

    Returns:
        Whether the run was still there to be killed.
    """
    pids = process.pids()
    if dice is not None and len(pids) > 1 and dice.random() < 0.5:
        end_all([dice.choice(pids)])
        wait(process, dice.uniform(0, 3))
    end_all(pids)
    return wait(process) == KILLED


def end_all(pids: Sequence[int]) -> None:
    """Kills those that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def finish(process: Process, log: Path) -> None:
    """Waits for a run to end well."""
    assert wait(process) == 0, log.read_text()[-4000:]


def compare(whole: Path, broken: Path, outcome: Outcome) -> None:
    """Raises AssertionError where two runs differ; counts what was compared."""
    folders = [run / f"version_{checkpoint(run)['run']['version']}" for run in (whole, broken)]
    rows, others = map(metrics, folders)
    assert rows == others, first_difference(rows, others)
    outcome.cells += sum(map(len, rows))
    ours, theirs = (samples(folder / "rollouts") for folder in folders)
    assert ours == theirs, "samples"
    outcome.samples += len(ours)
    states = [flat(comparable(checkpoint(run))) for run in (whole, broken)]
    assert states[0].keys() == states[1].keys(), states[0].keys() ^ states[1].keys()
    for name, value in states[0].items():
        assert same(value, states[1][name]), f"{broken}: {name}: {value} and {states[1][name]}"
    outcome.tensors += sum(hasattr(value, "dtype") for value in states[0].values())


def metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, as text, without the times."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in csv.DictReader(file)]


def samples(folder: Path) -> list[str]:
    """All samples of a run, each as text, since a NaN in a table is not equal to itself; each rank's end to end."""
    from rlmt.engines.rollout_files import read_rollouts

    return [repr(row) for row in sorted(read_rollouts(folder).to_pylist(), key=itemgetter("rank", "step"))]


def checkpoint(run: Path) -> dict[str, Any]:
    """What a run's last checkpoint holds."""
    import torch

    loaded: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return loaded


def comparable(loaded: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without paths and the number of the run's folder: one killed before its first step has another."""
    for name in ("config", "run"):
        del loaded[name]
    # What the loader and the validation count of their own; the position in the prompts is the data module's.
    loops = loaded["loops"]["fit_loop"]
    loops["state_dict"].pop("combined_loader")
    loaded["loops"] = {name: state for name, state in loops.items() if "val_loop" not in name}
    return loaded


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts and lists by the path to each leaf."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None:
        return {name: value}
    return {k: v for key, inner in items for k, v in flat(inner, f"{name}/{key}").items()}


def same(one: Any, other: Any) -> bool:
    """Whether two leaves have the same bits; NaN is NaN."""
    import torch

    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
    return bool(one == other or (one != one and other != other))


def first_difference(rows: list[dict[str, str]], others: list[dict[str, str]]) -> str:
    """In words, for a report."""
    for row, other in zip(rows, others, strict=False):
        if row != other:
            return f"step {row['step']}: " + str({k: (v, other.get(k)) for k, v in row.items() if v != other.get(k)})
    return f"{len(rows)} and {len(others)} rows: steps {[r['step'] for r in rows]} and {[r['step'] for r in others]}"


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--algorithm", choices=list(ALGORITHMS), default="GRPO")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--qlora", action="store_true")
    parser.add_argument("--engine", default="TransformersEngine")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--config", default="ddp", help="which spreads a run over several ranks")
    parser.add_argument("--start", choices=("fork", "exec"), default="fork", help="exec imports anew at each start")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
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
        spread = (args.config,) if args.ranks > 1 else ()
        world = World(tiny / "policy", tiny / "reward", prompts, options, ranks=args.ranks, configs=spread)
        outcome = crash(world, Path(folder, "runs"), args.kills, args.seed, args.start)
        name = args.algorithm + (", QLoRA" if args.qlora else ", LoRA" if args.lora else "")
        name += f", {args.engine}" + f", {args.ranks} ranks ({args.config})" * bool(spread)
        print(HEADER, outcome.row(name), f"\n{time.monotonic() - began:.0f} s, starts by {args.start}", sep="\n")


if __name__ == "__main__":
    main()
