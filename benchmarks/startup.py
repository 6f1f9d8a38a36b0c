"""Measures the time from `rlmt fit` to the first sampled token, on the models of `rlmt tiny`.

    python benchmarks/startup.py --out runs/startup [--runs 3] [--cold]

Each run is a new process that samples one token for each of two prompts, by vLLM in process. `--cold` drops the
machine's cache of files before each run, which takes root. The table has medians of the seconds that each stage takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

STAGES = ("imports", "options", "prompts", "checks and models", "vLLM imported and started", "first token")
"""Stages of a start, in their order."""
TIMES: list[float] = []
"""When each stage of this process was over, in seconds since the epoch."""


class Clock(Callback):
    """Notes when the stages of a trainer are over."""

    def __init__(self) -> None:
        TIMES.append(time.time())  # options are read when callbacks are made

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The checks are over, and models were loaded."""
        TIMES.append(time.time())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prompts were read."""
        TIMES.append(time.time())


def run_once(folder: Path) -> None:
    """One run, in this process."""
    from rlmt.cli.commands import main
    from rlmt.engines import VLLMEngine

    TIMES.append(time.time())
    sys.modules.setdefault("startup", sys.modules[__name__])
    start, generate = VLLMEngine.start, VLLMEngine.generate

    def timed_start(engine: VLLMEngine, *args: Any) -> None:
        start(engine, *args)
        TIMES.append(time.time())

    def timed_generate(engine: VLLMEngine, *args: Any) -> None:
        generate(engine, *args)
        TIMES.append(time.time())
        Path(os.environ["STARTUP_TIMES"]).write_text(json.dumps(TIMES))
        os._exit(0)  # what follows is not measured

    VLLMEngine.start, VLLMEngine.generate = timed_start, timed_generate  # type: ignore[method-assign, assignment]
    options: dict[str, object] = {
        "--model.policy": folder / "tiny/policy",
        "--model.reward.model": folder / "tiny/reward",
        "--model.format": "no_think",
        "--data.prompts": folder / "tiny/prompts.jsonl",
        "--data.batch_size": 2,
        "--data.group_size": 2,
        "--data.max_new_tokens": 1,
        "--data.val_size": 0,
        "--trainer.max_steps": 1,
        "--trainer.default_root_dir": folder / "run",
        "--trainer.callbacks": json.dumps([{"class_path": "startup.Clock"}]),
    }
    words = [word for name in ("base", "grpo", "tiny") for word in ("--config", name)]
    raise SystemExit(main(["fit", *words, *(str(word) for pair in options.items() for word in pair)]))


def durations(began: float, times: list[float]) -> list[float]:
    """The seconds of each stage of a run that began at `began`."""
    return [end - start for start, end in zip([began, *times], times, strict=False)]


def measure(folder: Path, cold: bool) -> list[float]:
    """Starts a run in a new process: the seconds of each stage."""
    if cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    result = folder / "times.json"
    result.unlink(missing_ok=True)
    began = time.time()
    command = [sys.executable, str(Path(__file__)), "--out", str(folder), "--once"]
    subprocess.run(command, check=True, env=os.environ | {"STARTUP_TIMES": str(result)}, stdout=subprocess.DEVNULL)
    return durations(began, json.loads(result.read_text()))


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/startup"), help="folder of models and runs")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="drop the machine's cache of files before each run")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    folder = args.out.absolute()
    if args.once:
        run_once(folder)
    if not (folder / "tiny/tiny.json").exists():
        from rlmt.demos.tiny import write_tiny

        write_tiny(folder / "tiny")
    stages = [measure(folder, args.cold) for _ in range(args.runs)]
    table = Table("stage", "seconds", title=f"start of rlmt fit, {'cold' if args.cold else 'warm'}")
    for name, seconds in zip(STAGES, zip(*stages, strict=True), strict=True):
        table.add_row(name, f"{statistics.median(seconds):.1f}")
    table.add_row("sum", f"{statistics.median(map(sum, stages)):.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
