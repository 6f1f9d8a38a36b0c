"""One of two ranks, started by test_supervised_ranks.py: each trains on its rows; first, alone, one on all of them."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from rlmt.data import PreferenceDataModule, SFTDataModule
from rlmt.distributed.fsdp2 import FSDP2, full_tensor, is_sharded
from rlmt.models.adapters import LoRA
from rlmt.modules import SFT, RewardModeling
from rlmt.modules.optimizers import MuonAdamW

FSDP, LORA, MUON = "fsdp", {"lora": LoRA(rank=4, alpha=64)}, {"optimizer": lambda named: MuonAdamW(named, muon_lr=0.05)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # what is trained, and how
    "sft": ("sft", {"prompt_weight": 0.3, "gradient_checkpointing": True}),
    "sft, adapter": ("sft", LORA),
    "sft, from scratch by Muon": ("sft", {"from_scratch": True, **MUON}),
    "reward": ("reward", {"centering": 0.1}),
    "reward, adapter": ("reward", LORA),
}


class Watch(Callback):
    """Gradients of each step, put together, and numbers of micro-batches."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.counts: list[int] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        losses = pl_module.losses

        def counted(*args: Any, **options: Any) -> Iterator[Any]:
            self.counts.append(0)
            for loss in losses(*args, **options):
                self.counts[-1] += 1
                yield loss

        pl_module.losses = counted

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.steps.append({name: full_tensor(p.grad).clone() for name, p in named if p.grad is not None})


def train(case: str, paths: dict[str, str], strategy: Any, devices: int) -> dict[str, Any]:
    """A batch of validation, two of training, and a validation."""
    kind, options = CASES[case]
    seed_everything(0, verbose=False)
    options = {"optimizer": lambda named: torch.optim.SGD(named, lr=0.3, momentum=0.9)} | options
    options |= {"tokens_per_micro_batch": 200, "max_grad_norm": 0.5}
    module: Any
    data: Any
    if kind == "sft":
        module = SFT(paths["policy"], **options)
        data = SFTDataModule(paths["sft"], batch_size=8, max_length=400, val_size=9)
    else:
        module = RewardModeling(paths["policy"], **options)
        data = PreferenceDataModule(paths["reward"], batch_size=8, max_length=400, val_size=9)
    watch = Watch()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        strategy=strategy,
        devices=devices,
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=2,
        num_sanity_val_steps=1,
        callbacks=[watch],
        enable_checkpointing=False,
        **quiet,  # type: ignore[arg-type]
    )
    trainer.fit(module, datamodule=data)
    assert is_sharded(module) == isinstance(strategy, FSDP2)
    loops = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    # In inference mode, which Lightning has on GPUs but not over gloo, weights put together could not be trained later.
    assert any(loop.inference_mode for loop in loops) != isinstance(strategy, FSDP2)
    return {
        "steps": watch.steps,
        "counts": watch.counts,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "weights": trainer.strategy.lightning_module_state_dict(),
        "state": trainer.strategy.optimizer_state(trainer.optimizers[0]),
    }


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)  # two processes on what may be two cores
    paths = json.loads((folder / "paths.json").read_text())
    results = {} if rank else {"alone": {case: train(case, paths, "auto", 1) for case in CASES}}
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": paths["port"], "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    env |= {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "ranks"}
    os.environ |= {name: str(value) for name, value in env.items()}
    results["ddp"] = {case: train(case, paths, "ddp", 2) for case in CASES}
    results["fsdp"] = {case: train(case, paths, FSDP2(), 2) for case in CASES}
    torch.save(results, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
