"""Training mode without the dropout of a model's config.

An objective compares log-probs under one policy: sampled by the engine, recomputed, and differentiated. With dropout
the last ones belong to another function, so that the first ratio is not 1. Eval mode turns off dropout and all other
noise of training (layer drop, router jitter) whatever the architecture calls them, but transformers recomputes
activations only in layers in training mode. Those layers are in training mode between their forward passes, and in
eval mode inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rlmt.annotations import PreTrainedModel
from rlmt.models.activation_checkpointing import Checkpointing, enable_checkpointing
from rlmt.models.adapters import is_adapter_layer


def set_training_mode(model: PreTrainedModel, gradient_checkpointing: Checkpointing, dropout: bool) -> None:
    """Prepares a model for training; adapters keep the dropout of their own option.

    Args:
        model: Model to train, with its adapters.
        gradient_checkpointing: Whether and which activations are recomputed in the backward pass.
        dropout: Whether the dropout of the model's config is active.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.train(dropout)
    enable_checkpointing(model, gradient_checkpointing)
    if dropout:
        return
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
            if _enter_eval_mode not in module._forward_pre_hooks.values():  # policy and critic can share layers
                module.register_forward_pre_hook(_enter_eval_mode)
                module.register_forward_hook(_leave_eval_mode, always_call=True)  # recomputation ends by an exception
        elif is_adapter_layer(module):
            module.training = True
            module.lora_dropout.train()


def recomputes_activations(model: nn.Module) -> bool:
    """True if gradient checkpointing is active in the mode that the model is in."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return any(
        layer.gradient_checkpointing and layer.training
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
    )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Sets eval mode, then restores each module's own mode: a frozen part can be in eval mode while the rest trains."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _enter_eval_mode(layer: Any, args: Any) -> None:
    layer._mode_outside = layer.training
    layer.training = False


def _leave_eval_mode(layer: Any, args: Any, output: Any) -> None:
    layer.training = layer._mode_outside
