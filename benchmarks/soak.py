"""Checks for leaks: memory, open files, threads and temporary folders over a few hundred tiny steps.

    python benchmarks/soak.py [--steps 200] [--engine TransformersEngine] [--algorithm PPO] [--lora] [--threshold 0.03]

The trainer and the engine share one process, whose resident memory covers both. Each step has other prompts and is
logged, every fifth step writes a checkpoint and validates, and every tenth draws the curves. The values at step 20,
when all caches are filled (fonts included), are compared with those at the last step. The exit status is 1 if memory
has grown by more than the threshold, or any other value has grown at all.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

SETTLED = 20
"""Step whose values are compared with those of the last step."""
GAUGES: list[dict[str, float]] = []


class Gauge(Callback):
    """Measures the process at the end of each step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Appends the values; the previous step is logged, saved and validated by now."""
        GAUGES.append(measure())


def measure() -> dict[str, float]:
    """Returns the current values."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    places = [Path(tempfile.gettempdir()), Path("/dev/shm")]
    return {
        "memory, MiB": int(status["VmRSS"].split()[0]) / 1024,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "Python threads": threading.active_count(),
        "temporary folders": sum(len(list(place.glob("rlmt-scratch-*"))) for place in places if place.is_dir()),
    }


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--engine", default="VLLMEngine")
    parser.add_argument("--algorithm", default="GRPO")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--threshold", type=float, default=0.03, help="allowed growth of memory, as a fraction")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    import soak  # this file, under the module name that the config uses

    from rlmt.cli.commands import main as rlmt
    from rlmt.demos.tiny import write_tiny
    from rlmt.demos.tiny_models import Sizes

    with tempfile.TemporaryDirectory(prefix="rlmt-soak-") as folder:
        tiny, config = Path(folder, "tiny"), Path(folder, "soak.yaml")
        write_tiny(tiny, sizes=Sizes(hidden=64, layers=2, heads=2, ffn=128, vocab=512, context=1024))
        names = ("CoTLength", "PolicyHealth")
        callbacks = "".join(f"{{class_path: rlmt.callbacks.{name}}}, " for name in names)
        config.write_text(
            f"trainer: {{callbacks: [{{class_path: soak.Gauge}}, {callbacks}"
            "{class_path: rlmt.callbacks.RewardCurves, init_args: {every_n_steps: 10}}, "
            "{class_path: rlmt.callbacks.SampleTable, init_args: {every_n_steps: 0}}, "
            "{class_path: rlmt.callbacks.PolicyCheckpoint, init_args: {every_n_steps: 5}}]}"
        )
        options = {
            "--model.policy": tiny / "policy",
            "--model.reward.model": tiny / "reward",
            "--model.format": "no_think",
            "--model.algorithm": args.algorithm,
            "--data.prompts": tiny / "prompts.jsonl",
            "--data.engine": args.engine,
            "--data.batch_size": 4,
            "--data.group_size": 4,
            "--data.max_prompt_tokens": 256,
            "--data.max_new_tokens": 32,
            "--data.val_size": 8,
            "--trainer.val_check_interval": 5,
            "--trainer.max_steps": args.steps + 1,  # the last step is measured at the start of one more
            "--trainer.default_root_dir": Path(folder, "run"),
            "--trainer.enable_progress_bar": "false",
            **({"--model.lora": "LoRA"} if args.lora else {}),
        }
        words = [str(word) for pair in options.items() for word in pair]
        configs = [word for name in ("base", "grpo", "tiny", str(config)) for word in ("--config", name)]
        assert rlmt(["fit", *configs, *words]) == 0
        left = measure()["temporary folders"]
    settled, last = soak.GAUGES[SETTLED], soak.GAUGES[args.steps]
    print(f"| {args.algorithm}{', LoRA' if args.lora else ''}, {args.engine} | step {SETTLED} | step {args.steps} |")
    print("|---|---|---|")
    for name, value in settled.items():
        print(f"| {name} | {value:,.0f} | {last[name]:,.0f} |")
    print(f"| temporary folders after the run | | {left:.0f} |")
    grown = last["memory, MiB"] / settled["memory, MiB"] - 1
    print(f"\nmemory: {grown:+.1%}")
    flat = all(last[name] <= value for name, value in settled.items() if name != "memory, MiB")
    return 0 if grown <= args.threshold and flat and not left else 1


if __name__ == "__main__":
    sys.exit(main())
