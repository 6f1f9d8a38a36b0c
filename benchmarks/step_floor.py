"""Compares the time of a training step with the sum of its parts, each timed alone on the same tokens.

    python benchmarks/step_floor.py --prompts FILE [--tiny runs/tiny] [--steps 8]

The parts: vLLM generating as many tokens for the same prompts, without log-probs; one plain forward and backward of the
policy over the same tokens, each sample with its prompt as in a plain trainer (and once more with the shared-prefix
forward that rlmt uses); one forward of the reward model over the same texts; and one of the reference, which the KL
penalty needs. The ratios leave the reference out, as a trainer without a KL penalty would, except the last one. A step
additionally has: weight sync, log-probs from the engine, decoding and splitting, entropies, clipping, the optimizer,
logging and writing all rollouts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table

from rlmt.algorithms import GRPO
from rlmt.callbacks import CoTLength, PolicyHealth, RewardCurves, SampleTable
from rlmt.data import RolloutDataModule
from rlmt.engines import VLLMEngine
from rlmt.models.micro_batch import hidden_states, micro_batches
from rlmt.models.rows import batches_by_length
from rlmt.modules import RLMTModule
from rlmt.rewards import ClassifierReward
from rlmt.types import Experience, RolloutBatch

WARM_UP = 2
"""Steps excluded from the results: the first ones start the engine and fill caches."""


class StepFloor(Callback):
    """Times the parts of each step after it; the time of the step excludes these measurements."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the timer."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Times the parts of the completed step."""
        step = time.perf_counter() - self._began
        assert isinstance(pl_module, RLMTModule)
        experience: Experience = outputs["experience"]
        rollouts = experience.rollouts
        self.rows.append(
            {
                "generate": self._timed(lambda: generate(trainer, rollouts)),
                "forward + backward": self._timed(lambda: forward_backward(pl_module, rollouts, False)),
                "forward + backward, shared prefix": self._timed(lambda: forward_backward(pl_module, rollouts, True)),
                "reference forward, shared prefix": self._timed(lambda: reference_forward(pl_module, rollouts)),
                "reward forward": self._timed(reward_forward(pl_module, experience)),
                "step": step,
                "tokens": float(sum(rollouts.lengths)),
            }
            # time/step_s would include the measurements after the previous step.
            | {
                name: value
                for name, value in outputs["metrics"].items()
                if name.startswith("time/") and name != "time/step_s"
            }
        )
        self._began = time.perf_counter()

    @staticmethod
    def _timed(run: Callable[[], None]) -> float:
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began


def generate(trainer: Trainer, batch: RolloutBatch) -> None:
    """Generates as many tokens for the same prompts with vLLM alone, without log-probs, stop tokens or seeds."""
    from vllm import SamplingParams

    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    engine = data.engine
    if engine.version is None:  # the engine sleeps between rollouts
        engine.sync(trainer.lightning_module.policy_weights(), batch.weight_version)  # type: ignore[operator]
    engine._llm.reset_prefix_cache()
    prompts = [{"prompt_token_ids": batch.prompt_ids[i // batch.group_size]} for i in range(len(batch))]
    params = [
        SamplingParams(temperature=batch.sampling.temperature, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in batch.lengths
    ]
    with torch.compiler.set_stance("force_eager" if engine._eager else "default"):
        engine._llm.generate(prompts, params, use_tqdm=False)


def forward_backward(module: RLMTModule, batch: RolloutBatch, share_prompts: bool) -> None:
    """Runs forward and backward of the cross-entropy on completion tokens, with or without a shared prefix."""
    policy: Any = module.policy
    budget = module.tokens_per_micro_batch
    for micro in micro_batches(batch, range(len(batch)), budget, share_prompts, module.device):
        logits = policy.lm_head(hidden_states(policy.model, micro))
        torch.nn.functional.cross_entropy(logits.float(), micro.targets).backward()
    policy.zero_grad()


@torch.no_grad()
def reference_forward(module: RLMTModule, batch: RolloutBatch) -> None:
    """Runs a forward of the reference over the same tokens, up to the cross-entropy; nothing without a KL penalty."""
    reference: Any = module.reference
    if reference is not None:
        for micro in micro_batches(batch, range(len(batch)), module.tokens_per_micro_batch, True, module.device):
            logits = reference.lm_head(hidden_states(reference.model, micro))
            torch.nn.functional.cross_entropy(logits.float(), micro.targets)


def reward_forward(module: RLMTModule, experience: Experience) -> Callable[[], None]:
    """Returns the classifier's forward over the scored texts; tokenization is done here, outside the timed call."""
    reward: Any = module.reward
    batch = experience.rollouts
    texts = [
        reward.render(batch.prompts[i // batch.group_size].messages, text)
        for i, text in enumerate(experience.scores.texts)
        if text is not None
    ]
    rows = reward._loaded_reader.encode(texts)
    plan = batches_by_length([len(row) for row in rows], reward.tokens_per_batch, module.device)
    return lambda: [reward._forward([rows[i] for i in part]) for part in plan] and None


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="prompt file or data set")
    parser.add_argument("--tiny", type=Path, default=Path("runs/tiny"), help="folder made by `rlmt tiny`")
    parser.add_argument("--policy", help="initial policy instead of the random one")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--format", default="no_think")
    parser.add_argument("--kl_coef", type=float, default=0.001)
    args = parser.parse_args()
    seed_everything(0)
    floor = StepFloor()
    module = RLMTModule(
        policy=args.policy or str(args.tiny / "policy"),
        reward=ClassifierReward(str(args.tiny / "reward")),
        algorithm=GRPO(kl_coef=args.kl_coef),
        format=args.format,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        tokens_per_micro_batch=8192,
    )
    data = RolloutDataModule(args.prompts, VLLMEngine(), batch_size=8, group_size=8, max_new_tokens=256, val_size=0)
    with tempfile.TemporaryDirectory() as folder:
        observers = [CoTLength(), RewardCurves(), PolicyHealth(), SampleTable(every_n_steps=0)]
        trainer = Trainer(
            max_steps=args.steps + WARM_UP,
            callbacks=[*observers, floor],
            logger=CSVLogger(folder),
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        trainer.fit(module, data)
    rows = floor.rows[WARM_UP:]
    parts = [name for name in rows[0] if name not in ("step", "tokens") and not name.startswith("time/")]
    table = Table(title=f"median of {len(rows)} steps, {statistics.median(r['tokens'] for r in rows):,.0f} tokens each")
    table.add_column("part")
    table.add_column("seconds", justify="right")
    for name in (*parts, *(name for name in rows[0] if name.startswith("time/")), "step"):
        table.add_row(name, f"{statistics.median(row[name] for row in rows):.3f}")
    generation, own, shared, reference, reward = parts
    for name, summed in {
        "step / its parts": (generation, own, reward),
        "step / its parts, shared prefix": (generation, shared, reward),
        "step / its parts, shared prefix, with the reference": (generation, shared, reference, reward),
    }.items():
        ratios = [row["step"] / sum(row[part] for part in summed) for row in rows]
        table.add_row(name, f"{statistics.median(ratios):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
