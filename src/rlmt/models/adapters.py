"""Adapters on a frozen base: LoRA by PEFT, inside the model's own class, so that the rest of rlmt sees no wrapper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

POLICY = "default"
"""Name of the adapter that makes the policy."""
CRITIC = "critic"
"""Name of the adapter that makes the critic, where both share a base."""


@contextmanager
def active(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Runs the model with another adapter, or None for its frozen base alone; which are trained stays as it is.

    Harmless on a model without adapters.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    # PEFT's own switches also change requires_grad, and a graph of one adapter would lose its leaves to the other.
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]
    try:
        yield
    finally:
        for layer, name, disabled in before:
            layer._active_adapter, layer._disable_adapters = name, disabled


def own_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is trained of a policy or of a critic: on a shared base each has its own."""
    own = getattr(model, "own_parameters", None)
    if own is not None:
        return list(own())
    return [p for name, p in model.named_parameters() if p.requires_grad and f".{CRITIC}." not in name]
