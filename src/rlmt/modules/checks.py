"""Configuration checks that run before any weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from rlmt.algorithms import CriticOptions
from rlmt.annotations import PretrainedConfig
from rlmt.distributed.fsdp2 import FSDP2
from rlmt.engines import Engine, TransformersEngine, VLLMEngine
from rlmt.errors import UserError
from rlmt.models.adapters import LoRA
from rlmt.models.quantization import NF4
from rlmt.modules.monitors import check_monitors

PRECISIONS = ("32-true", "bf16-mixed")
"""Trained weights are float32 in both; Lightning's other precisions cast the whole module, positions and reward too."""


def check_trainer(trainer: Trainer) -> None:
    """Checks that the modules support the trainer's precision and strategy, and log what its callbacks monitor.

    Raises:
        UserError: They do not.
    """
    if trainer.state.fn == "fit":
        check_monitors(trainer)
    if trainer.precision not in PRECISIONS:
        raise UserError(
            f"--trainer.precision is {trainer.precision}: use {' or '.join(PRECISIONS)}, since weights of 16 bits lose "
            "small updates."
        )
    if trainer.precision == "32-true" and isinstance(trainer.accelerator, CUDAAccelerator):
        rank_zero_warn(
            "--trainer.precision is 32-true on a GPU, which takes twice the memory of bf16-mixed for activations and "
            "several times its time: set --trainer.precision bf16-mixed unless you need float32."
        )
    if isinstance(trainer.strategy, FSDP2):
        module: Any = trainer.lightning_module
        check_residual(trainer.strategy, trainer.precision)
        if module.quantization is not None:
            raise UserError(
                "--model.quantization: FSDP2 cannot shard weights in 4 bits (--config fsdp). Use --config ddp, or "
                "leave the option out."
            )
        if module.lora is None:
            _check_sharded_optimizer(module.optimizer_factory)
    elif trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        raise UserError(
            f"--trainer.strategy is {type(trainer.strategy).__name__}, which rlmt does not support: use unsharded "
            "models on each rank (--config ddp), or sharded ones (--config fsdp)."
        )


def check_residual(strategy: FSDP2, precision: str | int | None) -> None:
    """Raises UserError if the strategy rounds hidden states of a run without mixed precision."""
    if strategy.bf16_residual and precision != "bf16-mixed":
        raise UserError(
            f"--trainer.strategy.bf16_residual is true, but --trainer.precision is {precision}: use bf16-mixed, or "
            "leave the option out."
        )


def _check_sharded_optimizer(optimizer_factory: Any) -> None:
    """Raises UserError for an optimizer that cannot step on DTensors."""
    names = ("model.layers.0.weight", "lm_head.weight")
    parameters = [{"params": [(name, nn.Parameter(torch.zeros(1, 1))) for name in names]}]
    kind = type(optimizer_factory(parameters))
    if kind.__module__.startswith("bitsandbytes"):
        raise UserError(
            f"--model.optimizer is {kind.__name__}: the optimizers of bitsandbytes do not support sharded weights "
            "(--config fsdp). Use torch.optim.AdamW, with --trainer.strategy.offload true if its moments do not fit."
        )


def check_sharded_run(trainer: Trainer, critic: CriticOptions | None, engines: Sequence[Engine]) -> None:
    """Checks that critic and engines of an RL run support sharded models.

    Args:
        trainer: The trainer; without FSDP2 there is nothing to check.
        critic: Options of the critic, if there is one.
        engines: Engines of the data module.

    Raises:
        UserError: They do not.
    """
    if not isinstance(trainer.strategy, FSDP2):
        return
    if critic is not None and critic.shared:
        raise UserError(
            "--model.algorithm.critic_shared: a critic cannot share the sharded weights of the policy (--config fsdp). "
            "Leave the option out."
        )
    if any(isinstance(engine, TransformersEngine) for engine in engines):
        raise UserError(
            "--data.engine is TransformersEngine, which generates with the policy itself and does not support sharded "
            "weights (--config fsdp). Use VLLMEngine or VLLMServerEngine."
        )


def check_engines(engines: Sequence[Engine], policy: PretrainedConfig, adapter: dict[str, Any] | None) -> None:
    """Checks that the engines support the policy, and that at most one vLLM runs in this process.

    Sleep mode and the parallel state of vLLM belong to the process.

    Args:
        engines: Engines of the data module.
        policy: The policy's config.
        adapter: PEFT's configuration of its adapter; None without one.

    Raises:
        UserError: One of them does not support the policy or the adapter, or there are two vLLMs.
    """
    if sum(isinstance(engine, VLLMEngine) for engine in engines) > 1:
        raise UserError(
            "--data.val_engine is a second VLLMEngine, but a process can hold one: leave the option out; validation "
            "then uses --data.engine."
        )
    for engine in engines:
        engine.check_policy(policy)
        if adapter is not None:
            engine.check_adapter(adapter)


def check_minibatches(minibatches: int, batch_size: int, ranks: int) -> None:
    """Checks that the prompts of a step divide into minibatches on every rank.

    Raises:
        UserError: They do not.
    """
    if batch_size // ranks % minibatches:
        each = f", {batch_size // ranks} on each of {ranks} ranks" if ranks > 1 else ""
        raise UserError(
            f"--model.algorithm.minibatches is {minibatches}, which does not divide the {batch_size} prompts of a step "
            f"(--data.batch_size{each}): use a divisor."
        )


def check_held_out(names: Sequence[str], validates: bool) -> None:
    """Checks that there are validation prompts for held-out rewards.

    Raises:
        UserError: There are none.
    """
    if names and not validates:
        raise UserError(
            f"--model.held_out_rewards has {', '.join(names)}, but there are no validation prompts: set "
            "--data.val_size above 0 or --data.val_prompts, or leave the rewards out."
        )


def check_adapter_options(lora: LoRA | None, quantization: NF4 | None) -> None:
    """Checks that quantized weights have an adapter to train.

    Raises:
        UserError: They have none.
    """
    if quantization is not None and lora is None:
        raise UserError("--model.quantization: weights in 4 bits cannot be trained; add --model.lora LoRA.")


def weights_dtype(trainer: Trainer, lora: LoRA | None) -> Literal["float32", "bfloat16"]:
    """Dtype that a model's weights are stored in: float32 if they are trained, else that of the forward pass."""
    return "bfloat16" if lora is not None and trainer.precision == "bf16-mixed" else "float32"
