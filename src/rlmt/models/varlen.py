"""Attention of packed rows by torch's variable-length kernel: `attn_implementation: varlen`.

transformers' default attends over packed rows through a mask of T × T tokens, with which torch leaves its flash
kernel. The variable-length kernel takes the boundaries of the rows instead and computes nothing between rows.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlmt.annotations import PretrainedConfig
from rlmt.errors import UserError
from rlmt.models.cache import shares_cache

VARLEN = "varlen"
"""Name of the attention implementation, beside transformers' own such as `sdpa`."""
_DROPS_BOUNDARIES = ("nemotron",)
"""Types whose layers do not pass the boundaries on (transformers 5.19)."""


@dataclass(frozen=True)
class PackedMask:
    """What layers get in place of a mask of packed rows."""

    window: int | None
    """Number of tokens that a token sees, itself included; None is all before it."""


def register_varlen() -> None:
    """Makes the implementation known to transformers, under its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, _mask)


def supports_varlen(config: PretrainedConfig) -> bool:
    """True if a model's layers have causal attention alone, and pass the boundaries of rows to its implementation.

    Args:
        config: Config of a causal language model or of a classifier of its type.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    text: Any = config.get_text_config()
    if model is None or text.model_type in _DROPS_BOUNDARIES:
        return False
    if any(getattr(text, name, None) for name in ("attn_logit_softcapping", "use_bidirectional_attention")):
        return False
    known = model._supports_attention_backend and model._supports_flash_attn and model._supports_sdpa
    return bool(known) and shares_cache(config)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PackedMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    row_boundaries: Tensor | None = None,
    row_lengths: list[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row of a packed row; `sdpa` where there is only one, or rows are padded.

    The kernel takes 16-bit floats on a GPU of compute capability 8 or newer, heads of up to 256 in multiples of 8, and
    no dropout. Other packed rows are computed one after the other, which gives the same.

    Args:
        module: The attention layer.
        query: [1, heads, T, D].
        key: [1, key heads, T, D].
        value: [1, key heads, T, V].
        attention_mask: Mask of rows that are not packed, or the window of packed ones.
        dropout: Probability of dropping an attention weight.
        scaling: Factor of the logits.
        row_boundaries: [b + 1] int32: the first token of each row, and T.
        row_lengths: Tokens of each row.
        **options: Other options of `sdpa`.

    Returns:
        [1, T, heads, V], and None in place of attention weights.

    Raises:
        UserError: The model's layers did not pass the boundaries on, or its mask does not know them.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

    several = row_lengths is not None and len(row_lengths) > 1
    if isinstance(attention_mask, PackedMask) and not several or isinstance(attention_mask, Tensor) and several:
        raise UserError(
            f"attn_implementation is {VARLEN}, but {type(module).__name__} or its mask is not told where packed rows "
            "begin; leave the option out."
        )
    if row_boundaries is None or row_lengths is None or not several:
        mask = attention_mask if isinstance(attention_mask, Tensor) else None
        return sdpa(module, query, key, value, mask, dropout, scaling, **options)
    # Some models make masks without positions: then None says that all tokens of the packed row are in the window.
    window = attention_mask.window if isinstance(attention_mask, PackedMask) else None
    kind = query.device.type
    if kind == "cuda" and torch.is_autocast_enabled(kind):
        query, key, value = (part.to(torch.get_autocast_dtype(kind)) for part in (query, key, value))
    if not dropout and _kernel_takes(query):
        return _kernel(query, key, value, row_boundaries, max(row_lengths), scaling, window), None
    rows = zip(*(torch.split(states, row_lengths, dim=2) for states in (query, key, value)), strict=True)
    parts = [sdpa(module, q, k, v, _window_mask(q.shape[2], window, q.device), dropout, scaling)[0] for q, k, v in rows]
    return torch.cat(parts, dim=1), None


def _kernel_takes(query: Tensor) -> bool:
    """Whether the kernel takes the device, dtype and heads of a query."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    size = query.shape[-1]
    return size <= 256 and size % 8 == 0 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Calls torch's kernel, which takes [T, heads, D]: [1, T, heads, V]."""
    from torch.nn.attention import varlen

    width = value.shape[-1]
    if width < query.shape[-1]:  # multi-head latent attention
        value = F.pad(value, [0, query.shape[-1] - width])
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    fewer_key_heads = {"enable_gqa": True} if q.shape[1] != k.shape[1] and _has_option(varlen.varlen_attn) else {}
    out = varlen.varlen_attn(
        *(q, k, v, boundaries, boundaries, longest, longest),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **fewer_key_heads,  # type: ignore[arg-type]
    )
    assert isinstance(out, Tensor)
    return out[None, ..., :width]


@functools.cache
def _has_option(kernel: Any) -> bool:
    """Whether the kernel of this torch takes fewer key heads by an option; that of others takes them without."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """[1, 1, length, length] bool: which tokens see which; None if all earlier ones are seen."""
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=device)
    back = at[:, None] - at
    return ((back >= 0) & (back < window))[None, None]


def _mask(
    *,
    allow_is_causal_skip: bool = True,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **options: Any,
) -> Tensor | PackedMask | None:
    """Mask of transformers' `sdpa`, or the window of packed rows."""
    from transformers.masking_utils import sdpa_mask

    # transformers sets this where positions start again within a row.
    if not allow_is_causal_skip and attention_mask is None and options["q_length"] == options["kv_length"]:
        return PackedMask(local_size)
    return sdpa_mask(
        allow_is_causal_skip=allow_is_causal_skip, attention_mask=attention_mask, local_size=local_size, **options
    )
