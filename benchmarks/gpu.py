"""Measures and checks rlmt on a GPU in minutes, without the hub, without files of weights, and without vLLM if need be.

    python benchmarks/gpu.py --out runs/gpu                            # an 8B Llama with random weights, on a GPU
    python benchmarks/gpu.py --out runs/gpu --parts 1 2 4 --size 1b    # some parts, a smaller model
    python benchmarks/gpu.py --out runs/gpu --device cpu --size tiny   # the same code on two CPU cores

Each part runs in a process of its own that is stopped when its time is over. Every figure is printed when it is known,
and appended to OUT/gpu.jsonl and to the table OUT/gpu.md. A part whose packages are missing is skipped, and a figure
that takes more memory than there is says so. The exit status is 1 if an equality does not hold, or a part failed or was
stopped.

Parts 3, 4, 5, 6, 9 and 12 run the `rlmt` command. In 4, 5, 6 and 9 it replays synthetic tokens from a rollout file. The
weights are made on the device in place of being read.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gpu_report import FAILED, Report


@dataclass(frozen=True)
class Part:
    """One part of the benchmark."""

    title: str
    function: str
    """Module and function, which takes a `gpu_models.Setup`."""
    seconds: int
    """Time until it is stopped, on an H100."""
    needs: tuple[str, ...] = ()
    """Packages without which it is skipped."""


RUN = ("jsonargparse", "torchdata", "datasets")
"""Packages that the `rlmt` command needs besides torch, transformers and lightning."""
PARTS: dict[int, Part] = {
    1: Part("versions and ceilings", "gpu_ceilings:ceilings", 25),
    2: Part("loss and gradient against the CPU and float64", "gpu_numerics:against_cpu", 60, ("jsonargparse",)),
    3: Part("kill and resume `rlmt fit`", "gpu_runs:kill_and_resume", 60, RUN),
    4: Part("LoRA update", "gpu_runs:lora_update", 80, (*RUN, "peft")),
    5: Part("QLoRA update", "gpu_runs:qlora_update", 80, (*RUN, "peft", "bitsandbytes")),
    6: Part("log-probs and rewards", "gpu_runs:forwards", 60, (*RUN, "peft")),
    7: Part("chunks of the output head", "gpu_numerics:head_chunks", 25, ("jsonargparse",)),
    8: Part("options of the update, one at a time", "gpu_options:options", 80, ("jsonargparse", "peft")),
    9: Part("FSDP2, offload and DDP", "gpu_runs:sharded", 80, RUN),
    10: Part("TransformersEngine", "gpu_engines:transformers_engine", 50, RUN),
    11: Part("vLLM", "gpu_engines:vllm_engine", 110, (*RUN, "vllm", "peft")),
    12: Part("steps of GRPO with vLLM", "gpu_runs:vllm_steps", 150, (*RUN, "vllm", "peft")),
}


def missing_packages(part: Part) -> list[str]:
    """The packages of a part that are not installed."""
    return [name for name in part.needs if importlib.util.find_spec(name) is None]


def run_part(number: int, args: argparse.Namespace, report: Report) -> None:
    """Runs one part in a process of its own, and stops it when its time is over."""
    part = PARTS[number]
    report.title(number, part.title)
    if missing := missing_packages(part):
        report.skip(f"not installed: {', '.join(missing)}")
        return
    seconds = part.seconds * args.patience
    command = [sys.executable, str(Path(__file__)), "--run", str(number), "--out", str(args.out)]
    command += ["--device", args.device, "--size", args.size]
    began = time.monotonic()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        stop(process)
    if status is None:
        report.fail(f"stopped after {seconds:.0f} s; --patience {2 * args.patience:g} doubles the time")
    elif status:
        report.fail(f"exit status {status}")
    else:
        report.row("time of the part", time.monotonic() - began, "s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kills a part and the processes that it started, which share its process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def run_here(args: argparse.Namespace) -> int:
    """Runs a part in this process."""
    from gpu_models import Setup

    module, _, function = PARTS[args.run].function.partition(":")
    setup = Setup(args.size, args.device, args.out / "work", Report(args.out, args.run))
    getattr(importlib.import_module(module), function)(setup)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--parts", type=int, nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("8b", "1b", "tiny"), default="8b", help="shape of the Llama")
    parser.add_argument("--patience", type=float, default=1.0, help="factor of all times until a part is stopped")
    parser.add_argument("--run", type=int, choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.out = args.out.absolute()
    if args.run:
        return run_here(args)
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report(args.out)
    report.start(f"{args.size} on {args.device}")
    for number in args.parts:
        run_part(number, args, report)
    shutil.rmtree(args.out / "work", ignore_errors=True)
    failed = [row for row in report.rows() if row["status"] == FAILED]
    for row in failed:
        print(f"FAILED: part {row['part']}, {row['figure']}: {row['value']} {row['unit']}".rstrip())
    print(f"{len(report.rows())} figures in {args.out / 'gpu.md'}; {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
