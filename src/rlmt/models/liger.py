"""Liger's kernels (arXiv 2410.10989) for norms and gated MLPs: one pass over memory where transformers takes several.

They are bound to the layers of one model. transformers' own integration, `apply_liger_kernel`, also replaces classes of
the process, so that every model that is built later has them, on a CPU too, where they cannot run; and it computes SiLU
whatever activation the config names.

Left out: Liger's rotary embedding, which overwrites the query and key projections that `selective` activation
checkpointing saves, and would rotate them again in backward; and its losses, in place of which rlmt has an output head.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rlmt.errors import UserError


def uses_kernels(option: bool | None, device: torch.device) -> bool:
    """Whether a run uses the kernels.

    Args:
        option: `--model.liger_kernels`; None is true where they are installed and can run.
        device: Device that the run computes on.
    """
    return _installed() and device.type == "cuda" if option is None else option


def check_kernels(device: torch.device, build: Callable[[], nn.Module]) -> None:
    """Checks that a run can use the kernels.

    Args:
        device: Device that the run computes on.
        build: Builds the model that is trained; it can be on the meta device.

    Raises:
        UserError: They are not installed, the device is not a GPU, or no layer of the model has one.
    """
    given = "--model.liger_kernels is true, but"
    if not _installed():
        raise UserError(f"{given} liger-kernel is not installed: pip install liger-kernel, or leave the option out.")
    if device.type != "cuda":
        raise UserError(f"{given} the run has no GPU, which the kernels need: leave the option out.")
    if not _replaceable_layers(model := build()):
        raise UserError(f"{given} no layer of {type(model).__name__} has a kernel: leave the option out.")


def bind_kernels(model: nn.Module) -> int:
    """Computes a model's norms and gated MLPs by the kernels, wherever the tensors are on a GPU.

    Parameters, and so checkpoints, stay as they are. A copy of the model has the kernels, too.

    Args:
        model: Model with layers of transformers, whatever their linear layers are: adapters and 4-bit weights stay.

    Returns:
        Number of layers that have a kernel.
    """
    layers = _replaceable_layers(model)
    for layer, forward in layers:
        layer.forward = MethodType(forward, layer)
    return len(layers)


def _installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _replaceable_layers(model: nn.Module) -> list[tuple[Any, Callable[..., Tensor]]]:
    """The layers whose forward a kernel computes, and the forward that calls it.

    transformers copies the code of a layer from family to family, so a layer that runs Llama's or Gemma's code is found
    whatever its class is called, and one that computes something else is not.
    """
    from transformers.activations import GELUTanh, SiLUActivation
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    gated = {nn.SiLU: _swiglu_mlp, SiLUActivation: _swiglu_mlp, GELUTanh: _geglu_mlp}
    found: list[tuple[Any, Callable[..., Tensor]]] = []
    for layer in model.modules():
        forward: Callable[..., Tensor] | None = None
        if _same_code(layer, LlamaRMSNorm, "forward"):
            forward = _rms_norm
        elif _same_code(layer, GemmaRMSNorm, "forward") and _same_code(layer, GemmaRMSNorm, "_norm"):
            forward = _gemma_rms_norm
        elif _same_code(layer, LlamaMLP, "forward"):
            forward = gated.get(type(layer.act_fn))
        if forward is not None:
            found.append((layer, forward))
    return found


def _same_code(layer: nn.Module, other: type[nn.Module], method: str) -> bool:
    """True if a method of the layer's class has the same instructions, names and constants as that of another class."""
    ours, theirs = (getattr(getattr(kind, method, None), "__code__", None) for kind in (type(layer), other))
    return ours is not None and all(
        getattr(ours, part) == getattr(theirs, part) for part in ("co_code", "co_names", "co_consts")
    )


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


# Forward passes of layers by kernels ----------------------------------------------------------------------------------


def _if_on_gpu(by_kernel: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Computes tensors on a CPU, where kernels cannot run, as the layer's class does."""

    @functools.wraps(by_kernel)
    def forward(layer: Any, x: Tensor) -> Tensor:
        output: Tensor = by_kernel(layer, x) if _on_gpu(x) else type(layer).forward(layer, x)
        return output

    return forward


@_if_on_gpu
def _rms_norm(layer: Any, x: Tensor) -> Tensor:
    if torch.promote_types(x.dtype, layer.weight.dtype) is not x.dtype:
        # transformers returns float32 for bfloat16 times a float32 weight; the kernel returns the dtype of its input.
        output: Tensor = type(layer).forward(layer, x)
        return output
    return _norm_by_kernel(x, layer.weight, layer.variance_epsilon, 0.0, "llama")


@_if_on_gpu
def _gemma_rms_norm(layer: Any, x: Tensor) -> Tensor:
    return _norm_by_kernel(x, layer.weight, layer.eps, 1.0, "gemma")


def _norm_by_kernel(x: Tensor, weight: Tensor, eps: float, offset: float, casting_mode: str) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    # In place, the gradient would overwrite that of the norm's output, which a residual stream shares in some families.
    output: Tensor = liger_rms_norm(x, weight, eps, offset, casting_mode, in_place=False)
    return output


@_if_on_gpu
def _swiglu_mlp(layer: Any, x: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    output: Tensor = layer.down_proj(liger_swiglu(layer.gate_proj(x), layer.up_proj(x)))
    return output


@_if_on_gpu
def _geglu_mlp(layer: Any, x: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_geglu

    output: Tensor = layer.down_proj(liger_geglu(layer.gate_proj(x), layer.up_proj(x)))
    return output
