"""Over which processes an RL run can be spread, and how."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from rlmt.engines import TransformersEngine
from rlmt.errors import UserError
from rlmt.sharding import FSDP2


def check_spread(trainer: Trainer) -> None:
    """Raises UserError where a run on several processes is one that cannot be had."""
    data: Any = getattr(trainer, "datamodule", None)
    if isinstance(trainer.strategy, FSDP2):
        _check_sharded(trainer, data)
    elif trainer.world_size == 1:
        return
    elif not isinstance(trainer.strategy, DDPStrategy):
        raise UserError(
            f"--trainer.strategy is {type(trainer.strategy).__name__}: rlmt spreads a run with whole models in each "
            "process (--config ddp) or with their weights in shards (--config fsdp); use one of these."
        )


def _check_sharded(trainer: Trainer, data: Any) -> None:
    module: Any = trainer.lightning_module
    if module.quantization is not None:
        raise UserError(
            "--model.quantization: weights in 4 bits cannot be cut into shards (--config fsdp); spread them by "
            "--config ddp, or leave the option out."
        )
    critic = module.algorithm.critic
    if critic is not None and critic.shared:
        raise UserError(
            "--model.algorithm.critic_shared: a critic on the policy's own weights cannot be had with these in shards "
            "(--config fsdp); leave the option out."
        )
    for engine in () if data is None else (data.engine, data.val_engine):
        if isinstance(engine, TransformersEngine):
            raise UserError(
                "--data.engine TransformersEngine samples with the policy itself, whose weights are in shards "
                "(--config fsdp); use VLLMEngine or VLLMServerEngine."
            )
