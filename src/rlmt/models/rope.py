"""Rotary embeddings whose frequencies depend on the length of the longest sequence in a batch.

transformers picks the frequencies of `longrope` (Phi-3, Phi-4-mini) and `dynamic` by the longest row of each forward
pass, padding included, so that log-probs beyond the original context would depend on the micro-batch; vLLM picks them
once by its max_model_len. Up to the original context all of them agree for `longrope`. For `dynamic`, vLLM scales at
every length.
"""

from __future__ import annotations

from typing import Any

from rlmt.annotations import PretrainedConfig
from rlmt.errors import UserError


def constant_rope_length(config: PretrainedConfig) -> int | None:
    """Length in tokens up to which the frequencies are the same in every batch; None without a limit."""
    lengths = [
        rope.get("original_max_position_embeddings") or config.get_text_config().max_position_embeddings
        for rope in _ropes(config)
        if rope.get("rope_type") in ("longrope", "dynamic")
    ]
    return min(map(int, lengths), default=None)


def check_vllm_rope(config: PretrainedConfig) -> None:
    """Checks that vLLM uses the frequencies of transformers.

    Raises:
        UserError: It does not.
    """
    if any(rope.get("rope_type") == "dynamic" for rope in _ropes(config)):
        raise UserError(
            f"{config.name_or_path or config.model_type}: its rope_parameters are of type dynamic, which vLLM scales "
            "at lengths at which transformers does not; use --data.engine TransformersEngine or another policy."
        )


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The rope parameters of all layer types."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]
