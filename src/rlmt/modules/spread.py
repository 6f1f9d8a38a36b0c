"""Over which processes a run can be spread, and how."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from rlmt.engines import TransformersEngine
from rlmt.errors import UserError
from rlmt.sharding import FSDP2


def check_strategy(trainer: Trainer) -> None:
    """Raises UserError where the module cannot be trained on several processes in the trainer's way."""
    if isinstance(trainer.strategy, FSDP2):
        module: Any = trainer.lightning_module
        if module.quantization is not None:
            raise UserError(
                "--model.quantization: weights in 4 bits cannot be cut into shards (--config fsdp); spread them by "
                "--config ddp, or leave the option out."
            )
        if module.lora is None:
            _check_optimizer(module)
    elif trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        raise UserError(
            f"--trainer.strategy is {type(trainer.strategy).__name__}: rlmt spreads a run with whole models in each "
            "process (--config ddp) or with their weights in shards (--config fsdp); use one of these."
        )


def check_spread(trainer: Trainer) -> None:
    """Raises UserError where an RL run wants of models in shards what these cannot give."""
    if not isinstance(trainer.strategy, FSDP2):
        return
    data: Any = getattr(trainer, "datamodule", None)
    module: Any = trainer.lightning_module
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


def _check_optimizer(module: Any) -> None:
    """Raises UserError for an optimizer that cannot step on shards."""
    names = ("model.layers.0.weight", "lm_head.weight")
    kind = type(module._optimizer([{"params": [(name, nn.Parameter(torch.zeros(1, 1))) for name in names]}]))
    if kind.__module__.startswith("bitsandbytes"):
        raise UserError(
            f"--model.optimizer {kind.__name__}: bitsandbytes' optimizers cannot step on weights in shards "
            "(--config fsdp); use torch.optim.AdamW, with --trainer.strategy.offload true if its moments do not fit."
        )
