"""Choice of an attention implementation that computes what the model's config says."""

from __future__ import annotations

from typing import Any

from rlmt.annotations import PretrainedConfig
from rlmt.errors import UserError
from rlmt.models.varlen import VARLEN, register_varlen, supports_varlen


def attention_options(config: PretrainedConfig, attn_implementation: str | None, source: str) -> dict[str, Any]:
    """Selects the attention implementation of a model.

    Gemma 2 and its relatives cap their attention logits (`attn_logit_softcapping`). transformers' default, `sdpa`,
    silently computes attention without the cap, so such models get `eager` by default. `varlen` is made known to
    transformers when it is asked for.

    Args:
        config: Config of the model.
        attn_implementation: Implementation that the user asks for; None is the default.
        source: Folder or hub name for the message.

    Returns:
        Options of transformers' `from_pretrained` and `from_config`.

    Raises:
        UserError: The implementation ignores the model's cap, or is `varlen` and the model cannot have it.
    """
    if attn_implementation == VARLEN:
        if not supports_varlen(config):
            raise UserError(
                f"attn_implementation is {VARLEN}, but {source} ({config.model_type}) has other layers than plain "
                "causal attention, or does not tell them where packed rows begin; leave the option out."
            )
        register_varlen()
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if cap is None:
        return {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if attn_implementation is not None and "sdpa" in attn_implementation:
        raise UserError(
            f"attn_implementation is {attn_implementation}, which ignores the cap on attention logits of {source} "
            f"(attn_logit_softcapping {cap:g}); set it to eager, flex_attention or flash_attention_2, or leave it out."
        )
    return {"attn_implementation": attn_implementation or "eager"}
