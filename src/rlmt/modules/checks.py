"""What can be told of a run before any weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rlmt.distributed.fsdp2 import FSDP2
from rlmt.engines import TransformersEngine
from rlmt.errors import UserError
from rlmt.models import loading
from rlmt.models.adapters import LoRA, adapter_config, check_same_adapter
from rlmt.models.critic import check_critic
from rlmt.models.quantization import NF4
from rlmt.modules.offline_rollouts import check_offline_rollouts, offline_rollouts_of

if TYPE_CHECKING:
    from rlmt.modules.rlmt import RLMTModule

PRECISIONS = ("32-true", "bf16-mixed")
"""Trained weights are float32 in both; Lightning's other precisions cast the whole module, positions and reward too."""


def check_trainer(trainer: Trainer) -> None:
    """Raises UserError where the trainer cannot do what the modules need."""
    if trainer.precision not in PRECISIONS:
        raise UserError(
            f"--trainer.precision is {trainer.precision}: use {' or '.join(PRECISIONS)}, since small updates are lost "
            "in weights of 16 bits."
        )
    check_strategy(trainer)


def check_run(module: RLMTModule, stage: str) -> None:
    """Looks for mistakes in what an RL module is given: trainer, policy, rewards, adapter, objective and data.

    Args:
        module: attached to its trainer.
        stage: fit, validate, test or predict.

    Raises:
        UserError: there is one.
    """
    check_trainer(module.trainer)
    check_sharded_run(module.trainer)
    module.format.check(module.tokenizer, module.policy_path)
    loading.check_head(module.policy_config, module.policy_path)
    module.reward.check()
    module.held_out.check(module.reward)
    data: Any = getattr(module.trainer, "datamodule", None)
    adapter = adapter_config_for(module.policy_config, module.lora)
    for engine in () if data is None else (data.engine, data.val_engine):
        if engine is not None:
            engine.check_policy(module.policy_config)
            if adapter is not None:
                engine.check_adapter(adapter)
    if module.quantization is not None:
        module.quantization.check()
    if stage == "fit":
        if module.algorithm.critic is not None:
            check_critic(module.algorithm.critic, module.policy_path, module.tokenizer)
        if data is not None:
            module.algorithm.check(data.group_size)
            _check_minibatches(module, data.batch_size)
            _check_validation(module, data)
        if (recording := offline_rollouts_of(module.trainer)) is not None:
            check_offline_rollouts(recording, module.policy_config, module.algorithm)


def _check_minibatches(module: RLMTModule, prompts: int) -> None:
    parts, ranks = module.algorithm.minibatches, module.trainer.world_size
    if prompts // ranks % parts:
        each = f", {prompts // ranks} on each of {ranks} processes" if ranks > 1 else ""
        raise UserError(
            f"--model.algorithm.minibatches is {parts}: it does not divide the {prompts} prompts of a step "
            f"(--data.batch_size{each}); make it a divisor."
        )


def _check_validation(module: RLMTModule, data: Any) -> None:
    if len(module.held_out) and not data.val_dataloader():
        raise UserError(
            f"--model.held_out_rewards has {', '.join(module.held_out.names)}, but there are no validation prompts: "
            "set --data.val_size above 0 or --data.val_prompts, or leave them out."
        )


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


def check_sharded_run(trainer: Trainer) -> None:
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


def check_adapter_options(lora: LoRA | None, quantization: NF4 | None, from_scratch: bool = False) -> None:
    """Raises UserError where an adapter and what it is put on do not go together."""
    if quantization is not None and lora is None:
        raise UserError("--model.quantization: weights in 4 bits cannot be trained; add --model.lora LoRA.")
    if from_scratch and lora is not None:
        raise UserError(
            "--model.from_scratch draws weights to be trained, and --model.lora keeps them as they are: leave one out."
        )


def adapter_config_for(config: PretrainedConfig, lora: LoRA | None, auto: Any = AutoModelForCausalLM) -> Any:
    """The configuration that a model's adapter will have, as plain data; None without. No weights are read.

    Args:
        config: of the model.
        lora: the adapter's options.
        auto: transformers' class that loads the model.

    Raises:
        UserError: the model has no layers for it.
    """
    return None if lora is None else lora.config(loading.meta_model(config, auto))


def weights_dtype(trainer: Trainer, lora: LoRA | None) -> Literal["float32", "bfloat16"]:
    """What a model's weights are held in: float32 if they are trained, else what they are multiplied in."""
    return "bfloat16" if lora is not None and trainer.precision == "bf16-mixed" else "float32"


def trainable_names(module: nn.Module) -> set[str]:
    """Names of the weights that are trained."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def adapter_state(model: PreTrainedModel, quantization: NF4 | None) -> dict[str, Any]:
    """For a checkpoint, what makes the model of the base's weights: its adapter, and how the base is quantised."""
    return {"adapter": adapter_config(model), "quantization": _plain(quantization)}


def check_adapter_state(saved: dict[str, Any], adapter: dict[str, Any] | None, quantization: NF4 | None) -> None:
    """Refuses a checkpoint of another adapter or another base than the run's.

    Args:
        saved: what `adapter_record` gave.
        adapter: the run's, as `planned_adapter` gives it.
        quantization: how the run holds the base.

    Raises:
        UserError: it is one.
    """
    check_same_adapter(saved, {"adapter": adapter, "quantization": _plain(quantization)})


def _plain(quantization: NF4 | None) -> dict[str, Any] | None:
    return None if quantization is None else quantization.to_dict()
