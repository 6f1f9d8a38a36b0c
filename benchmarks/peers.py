"""Measures steps of GRPO by rlmt and by TRL, on the same policy, reward model, prompts and settings.

    python benchmarks/peers.py --out runs/peers [--steps 4] [--prompts FILE]

Each peer runs in a process of its own, one after the other. TRL, in its newest release, is installed into a virtual
environment in the output folder that sees the packages of this one. Both train a policy of the size of `rlmt tiny`
whose random weights seldom end an answer, with learning rate 0, so that its samples do not change: 8 prompts × 8
samples of up to 256 tokens at temperature 1, the classifier's reward, KL penalty 0.001, and 32 samples in a
micro-batch. rlmt samples with vLLM. So does TRL on a GPU; on a CPU it samples with transformers, since it does not run
vLLM there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import site
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_models import card_memory
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

PROMPTS, GROUP, NEW_TOKENS, PROMPT_TOKENS, ROWS = 8, 8, 256, 256, 32
"""Prompts of a step, samples of a prompt, most tokens of a sample and of a prompt, samples in a micro-batch."""
KL, TEMPERATURE = 0.001, 1.0
WARM_UP = 1
"""Steps that count for the start alone."""
STARTED = float(os.environ.get("PEERS_STARTED", "0")) or time.time()
"""When the process of this peer was started, in seconds since the epoch."""
STEPS: list[dict[str, float]] = []
"""Seconds of each step and its sampled tokens."""


class StepTimes(Callback):
    """Times the steps of rlmt."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock, before the first step only: a step lasts from the end of the one before."""
        self.began = getattr(self, "began", time.perf_counter())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops it."""
        now = time.perf_counter()
        seconds, self.began = now - self.began, now
        add_step(seconds, float(sum(outputs["experience"].rollouts.lengths)))


def add_step(seconds: float, tokens: float) -> None:
    """Notes a step, and after the first one the time since the process was started."""
    STEPS.append({"seconds": seconds, "tokens": tokens, "since_start": time.time() - STARTED})


def run_rlmt(folder: Path, prompts: Path, steps: int) -> None:
    """Trains with the `rlmt` command."""
    from rlmt.cli.commands import main

    sys.modules.setdefault("peers", sys.modules[__name__])
    observers = ["rlmt.callbacks.CoTLength", "rlmt.callbacks.RewardCurves", "rlmt.callbacks.PolicyHealth"]
    options: dict[str, object] = {
        "--model.policy": folder / "policy",
        "--model.reward.model": folder / "tiny/reward",
        "--model.format": "no_think",
        "--model.algorithm.kl_coef": KL,
        "--model.optimizer.lr": 0.0,
        "--model.tokens_per_micro_batch": ROWS * (NEW_TOKENS + 64),
        "--data.prompts": prompts,
        "--data.batch_size": PROMPTS,
        "--data.group_size": GROUP,
        "--data.max_new_tokens": NEW_TOKENS,
        "--data.max_prompt_tokens": PROMPT_TOKENS,
        "--data.temperature": TEMPERATURE,
        "--data.val_size": 0,
        "--trainer.max_steps": steps,
        "--trainer.default_root_dir": folder / "rlmt",
        "--trainer.enable_progress_bar": "false",
        "--trainer.callbacks": json.dumps([{"class_path": name} for name in [*observers, "peers.StepTimes"]]),
    }
    words = [word for name in ("base", "grpo", "tiny") for word in ("--config", name)]
    if main(["fit", *words, *(str(word) for pair in options.items() for word in pair)]):
        raise SystemExit("rlmt fit failed")


def run_trl(folder: Path, prompts: Path, steps: int) -> None:
    """Trains with TRL's GRPOTrainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rlmt.data.prompts import load_prompts

    class TRLSteps(TrainerCallback):  # type: ignore[misc]
        """Times the steps of TRL."""

        began = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = self.began or time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "completions/mean_length" in logs:  # at the end of each step
                now = time.perf_counter()
                seconds, self.began = now - self.began, now
                add_step(seconds, logs["completions/mean_length"] * PROMPTS * GROUP)

    on_gpu = torch.cuda.is_available()
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=PROMPTS * GROUP // ROWS,
        num_generations=GROUP,
        max_completion_length=NEW_TOKENS,
        temperature=TEMPERATURE,
        beta=KL,
        learning_rate=0.0,
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not on_gpu,
        use_vllm=on_gpu,
        model_init_kwargs={"dtype": "float32"},
    )
    chats = [{"prompt": list(prompt.messages)} for prompt in load_prompts(str(prompts))]
    policy, reward = str(folder / "policy"), str(folder / "tiny/reward")
    trainer = GRPOTrainer(policy, reward, args=config, train_dataset=Dataset.from_list(chats), callbacks=[TRLSteps()])
    trainer.train()


PEERS: dict[str, Callable[[Path, Path, int], None]] = {"rlmt": run_rlmt, "TRL": run_trl}


def run_peer(name: str, folder: Path, prompts: Path, steps: int) -> None:
    """Runs a peer in this process and writes its figures."""
    with card_memory() as most:
        PEERS[name](folder, prompts, steps)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {"steps": STEPS, "memory": most[0] or resident}
    (folder / f"{name}.json").write_text(json.dumps(figures))


def write_models(folder: Path) -> None:
    """Writes the models and prompts of `rlmt tiny`, and a policy of the same shape with random weights."""
    from rlmt.demos.tiny import write_tiny

    write_tiny(folder / "tiny")
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "tiny/policy"))
    AutoTokenizer.from_pretrained(folder / "tiny/policy").save_pretrained(folder / "policy")
    policy.save_pretrained(folder / "policy")


def python_of(name: str, folder: Path) -> str:
    """The interpreter of a peer: for TRL one of a virtual environment of its own, which is made once."""
    if name == "rlmt":
        return sys.executable
    home = folder / "trl-venv"
    python = home / "bin/python"
    if not (home / "installed").exists():
        venv.create(home, with_pip=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        # addsitedir reads the .pth files of the folder, too, such as that of an editable rlmt.
        lines = [f"import site; site.addsitedir({packages!r})" for packages in site.getsitepackages()]
        (home / f"lib/{version}/site-packages/shared.pth").write_text("\n".join(lines))
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "trl"], check=True)
        (home / "installed").touch()
    return str(python)


def table_of(folder: Path, names: list[str]) -> Table:
    """Medians over the steps after the first."""
    table = Table(title=f"GRPO, {PROMPTS} × {GROUP} samples of up to {NEW_TOKENS} tokens")
    for column in ("", "seconds a step", "sampled tokens a second", "start and first step, s", "most memory, GB"):
        table.add_column(column, justify="right" if column else "left")
    for name in names:
        figures = json.loads((folder / f"{name}.json").read_text())
        steps = figures["steps"][WARM_UP:]
        seconds = statistics.median(step["seconds"] for step in steps)
        speed = statistics.median(step["tokens"] / step["seconds"] for step in steps)
        start, memory = figures["steps"][0]["since_start"], figures["memory"] / 1e9
        table.add_row(name, f"{seconds:.1f}", f"{speed:,.0f}", f"{start:.0f}", f"{memory:.2f}")
    return table


def main(argv: list[str] | None = None) -> None:
    """Runs the peers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/peers"), help="folder of models, runs and figures")
    parser.add_argument("--prompts", type=Path, help="prompt file in place of those of `rlmt tiny`")
    parser.add_argument("--steps", type=int, default=4, help="steps after the first one")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--run", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    folder = args.out.absolute()
    prompts = (args.prompts or folder / "tiny/prompts.jsonl").absolute()
    if args.run:
        run_peer(args.run, folder, prompts, args.steps + WARM_UP)
        return
    if not (folder / "policy/model.safetensors").exists():
        write_models(folder)
    command = [str(Path(__file__)), "--out", str(folder), "--prompts", str(prompts), "--steps", str(args.steps)]
    for name in args.peers:
        python = python_of(name, folder)
        subprocess.run(
            [python, *command, "--run", name], check=True, env=os.environ | {"PEERS_STARTED": str(time.time())}
        )
    Console().print(table_of(folder, args.peers))


if __name__ == "__main__":
    main()
