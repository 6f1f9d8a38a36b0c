"""Over which processes an RL run can be spread, and how."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from rlmt.errors import UserError


def check_spread(trainer: Trainer, stage: str) -> None:
    """Raises UserError where a run on several processes is one that cannot be had."""
    if trainer.world_size == 1:
        return
    name = type(trainer.strategy).__name__
    if not isinstance(trainer.strategy, DDPStrategy):
        raise UserError(
            f"--trainer.strategy is {name}: rlmt spreads a run by `ddp` (--config ddp), with whole models in each "
            "process; it cannot train weights in shards. Where they do not fit, use --config qlora."
        )
    if stage == "predict":
        raise UserError(f"--trainer.devices gives {trainer.world_size} processes: predict runs on one; set 1.")
    data: Any = getattr(trainer, "datamodule", None)
    if data is not None and data.engine.concurrent:
        raise UserError(
            f"--data.engine {type(data.engine).__name__}: servers take weights from one trainer process, and "
            f"--trainer.devices gives {trainer.world_size}; set 1, or --data.engine VLLMEngine, one in each process."
        )
