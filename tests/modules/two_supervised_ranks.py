"""A rank of test_supervised_ranks.py: trains on its rows by DDP and FSDP2; rank 0 first trains alone on all rows."""

import os
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
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # module, and its options
    "sft": ("sft", {"prompt_weight": 0.3, "gradient_checkpointing": True}),
    "sft, adapter": ("sft", LORA),
    "sft, from scratch by Muon": ("sft", {"from_scratch": True, **MUON}),
    "reward": ("reward", {"centering": 0.1}),
    "reward, adapter": ("reward", LORA),
}


class Watch(Callback):
    """Records the full gradients of each step and the number of micro-batches of each batch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.counts: list[int] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        name = "_micro_batches" if hasattr(pl_module, "_micro_batches") else "losses"  # what validation uses, too
        parts = getattr(pl_module, name)

        def counted(*args: Any, **options: Any) -> Iterator[Any]:
            self.counts.append(0)
            for part in parts(*args, **options):
                self.counts[-1] += 1
                yield part

        setattr(pl_module, name, counted)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.steps.append({name: full_tensor(p.grad).clone() for name, p in named if p.grad is not None})


def train(case: str, paths: dict[str, str], strategy: Any, devices: int) -> dict[str, Any]:
    """Runs a sanity validation batch, two training batches and a validation epoch."""
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
    # All-gathered weights made in inference mode could not be trained later. Lightning leaves that mode off over gloo.
    assert any(loop.inference_mode for loop in loops) != isinstance(strategy, FSDP2)
    return {
        "steps": watch.steps,
        "counts": watch.counts,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "weights": trainer.strategy.lightning_module_state_dict(),
        "state": trainer.strategy.optimizer_state(trainer.optimizers[0]),
    }


def main(rank: int, folder: Path, port: int, paths: dict[str, str]) -> None:
    """Writes the results of all cases to rank<rank>.pt."""
    os.chdir(folder)
    results = {} if rank else {"alone": {case: train(case, paths, "auto", 1) for case in CASES}}
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    env |= {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "ranks"}
    os.environ |= {name: str(value) for name, value in env.items()}
    results["ddp"] = {case: train(case, paths, "ddp", 2) for case in CASES}
    results["fsdp"] = {case: train(case, paths, FSDP2(), 2) for case in CASES}
    torch.save(results, folder / f"rank{rank}.pt")
