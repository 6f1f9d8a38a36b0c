"""Activation checkpointing of transformers' layers: in full, or selective."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from rlmt.annotations import PreTrainedModel

Checkpointing = bool | Literal["selective"]
"""Whether backward recomputes the activations of each layer: all of them, or none of matrix products and attention."""

_ATEN: Any = torch.ops.aten
_SAVED_OPERATORS = frozenset(
    operator
    for packet in (
        *(_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN._grouped_mm),
        *(_ATEN._scaled_dot_product_flash_attention, _ATEN._scaled_dot_product_efficient_attention),
        *(_ATEN._scaled_dot_product_cudnn_attention, _ATEN._scaled_dot_product_flash_attention_for_cpu),
    )
    for operator in (getattr(packet, name) for name in packet.overloads())
)
"""Operators that take nearly all of a layer's time; their outputs are saved, and all others are recomputed."""


def enable_checkpointing(model: PreTrainedModel, mode: Checkpointing) -> None:
    """Enables activation checkpointing of a model's layers, unless the mode is False.

    Args:
        model: Model with transformers' layers.
        mode: True saves the input of each layer. `selective` also saves the results of matrix products and attention,
            so that backward recomputes only what is cheap.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _save_products)
    if mode:
        model.gradient_checkpointing_enable(options)


def _save_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # torch_attn has the variable-length kernel alone, and is imported where a model uses it.
    saved = operator in _SAVED_OPERATORS or getattr(operator, "namespace", None) == "torch_attn"
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
