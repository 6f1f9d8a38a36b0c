"""What can be told of a run before any weights are read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from rlmt.errors import UserError
from rlmt.models import loading
from rlmt.models.critic import check_critic
from rlmt.modules.adapted import planned_adapter
from rlmt.modules.recorded import check_recording, recording_of
from rlmt.modules.spread import check_spread, check_strategy

if TYPE_CHECKING:
    from rlmt.modules.rlmt import RLMTModule

PRECISIONS = ("32-true", "bf16-mixed")
"""Trained weights are float32 in both; Lightning's other precisions cast the whole module, positions and reward too."""


def check_options(positive: dict[str, float], not_negative: dict[str, float] | None = None) -> None:
    """Raises UserError for an option of the module that is out of its range."""
    for name, value in positive.items():
        if not value > 0:
            raise UserError(f"--model.{name} is {value}: it must be positive.")
    for name, value in (not_negative or {}).items():
        if not 0 <= value < math.inf:
            raise UserError(f"--model.{name} is {value}: it must be 0 or positive.")


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
    check_spread(module.trainer)
    module.format.check(module.tokenizer, module.policy_path)
    loading.check_head(module.policy_config, module.policy_path)
    module.reward.check()
    module.held_out.check(module.reward)
    data: Any = getattr(module.trainer, "datamodule", None)
    adapter = planned_adapter(module.policy_config, module.lora)
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
        if (recording := recording_of(module.trainer)) is not None:
            check_recording(recording, module.policy_config, module.algorithm)


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
