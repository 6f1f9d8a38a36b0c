"""Attention of packed rows by torch's variable-length kernel: `attn_implementation: varlen`.

transformers' default attends over packed rows through a mask of T × T tokens, with which torch leaves its flash
kernel. The variable-length kernel takes the boundaries of the rows instead and computes nothing between rows.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlmt.annotations import PretrainedConfig
from rlmt.models.cache import shares_cache

VARLEN = "varlen"
"""Name of the attention implementation, beside transformers' own such as `sdpa`."""


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
    if model is None or getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        return False
    known = model._supports_attention_backend and model._supports_flash_attn and model._supports_sdpa
    return bool(known) and shares_cache(config)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row of a packed row; without boundaries as `sdpa`.

    The kernel takes 16-bit floats on a GPU, heads of up to 256 in multiples of 8, and no dropout. Other packed rows are
    computed one after the other, which gives the same.

    Args:
        module: The attention layer.
        query: [1, heads, T, D].
        key: [1, key heads, T, D].
        value: [1, key heads, T, V].
        attention_mask: Mask of rows that are not packed.
        dropout: Probability of dropping an attention weight.
        scaling: Factor of the logits.
        sliding_window: Number of tokens that a token sees, itself included; None is all before it.
        cu_seq_lens_q: [b + 1] int32 boundaries of the rows; None if they are not packed.
        max_length_q: Tokens of the longest row.
        **options: Other options of `sdpa`.

    Returns:
        [1, T, heads, V], and None in place of attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

    if cu_seq_lens_q is None:
        return sdpa(module, query, key, value, attention_mask, dropout, scaling, **options)
    kind = query.device.type
    if query.is_cuda and torch.is_autocast_enabled(kind):
        query, key, value = (part.to(torch.get_autocast_dtype(kind)) for part in (query, key, value))
    size = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.is_cuda and half and size <= 256 and size % 8 == 0 and not dropout:
        return _kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    lengths = cu_seq_lens_q.diff().tolist()
    rows = zip(*(torch.split(states, lengths, dim=2) for states in (query, key, value)), strict=True)
    parts = [
        sdpa(module, q, k, v, _window(q.shape[2], sliding_window, q.device), dropout, scaling)[0] for q, k, v in rows
    ]
    return torch.cat(parts, dim=1), None


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
    from torch.nn.attention.varlen import varlen_attn

    width = value.shape[-1]
    value = F.pad(value, [0, query.shape[-1] - width])  # multi-head latent attention has narrower values
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    # Before torch 2.13 fewer key heads need no option.
    known = "enable_gqa" in inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": True} if known and q.shape[1] != k.shape[1] else {}
    out = varlen_attn(
        *(q, k, v, boundaries, boundaries, longest, longest),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    assert isinstance(out, Tensor)
    return out[None, ..., :width]


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """[1, 1, length, length] bool: which tokens see which; None if all earlier ones are seen."""
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=device)
    back = at[:, None] - at
    return ((back >= 0) & (back < window))[None, None]


def _mask(*, allow_is_causal_skip: bool = True, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """Mask of transformers' `sdpa`, and none for packed rows."""
    from transformers.masking_utils import sdpa_mask

    # transformers sets this where positions start again within a row.
    packed = not allow_is_causal_skip and attention_mask is None and options["q_length"] == options["kv_length"]
    if packed:
        return None
    return sdpa_mask(allow_is_causal_skip=allow_is_causal_skip, attention_mask=attention_mask, **options)
