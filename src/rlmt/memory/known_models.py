"""Configs of common models, so that `rlmt plan` needs neither the hub nor access to gated repositories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from rlmt.models import loading

_LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
_QWEN2: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768}
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "head_dim": 128,
}
_SMOL: dict[str, Any] = {"model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192}
_CLASSIFIER = {"num_labels": 1, "architectures": ["LlamaForSequenceClassification"]}


def _shape(family: dict[str, Any], *sizes: int, tied: bool = False, **more: Any) -> dict[str, Any]:
    """A config from hidden size, layers, attention heads, key-value heads and width of the feed-forward layers."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return {**family, **dict(zip(names, sizes, strict=True)), "tie_word_embeddings": tied, "dtype": "bfloat16", **more}


_LLAMA_8B = _shape(_LLAMA, 4096, 32, 32, 8, 14336)
_BASES = {
    "meta-llama/Llama-3.2-1B": _shape(_LLAMA, 2048, 16, 32, 8, 8192, tied=True, head_dim=64),
    "meta-llama/Llama-3.2-3B": _shape(_LLAMA, 3072, 28, 24, 8, 8192, tied=True, head_dim=128),
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": _shape(_LLAMA, 8192, 80, 64, 8, 28672),
    "Qwen/Qwen2.5-0.5B": _shape(_QWEN2, 896, 24, 14, 2, 4864, tied=True),
    "Qwen/Qwen2.5-1.5B": _shape(_QWEN2, 1536, 28, 12, 2, 8960, tied=True),
    "Qwen/Qwen2.5-3B": _shape(_QWEN2, 2048, 36, 16, 2, 11008, tied=True),
    "Qwen/Qwen2.5-7B": _shape(_QWEN2, 3584, 28, 28, 4, 18944, vocab_size=152064),
    "Qwen/Qwen2.5-14B": _shape(_QWEN2, 5120, 48, 40, 8, 13824, vocab_size=152064),
    "Qwen/Qwen2.5-32B": _shape(_QWEN2, 5120, 64, 40, 8, 27648, vocab_size=152064),
    "Qwen/Qwen2.5-72B": _shape(_QWEN2, 8192, 80, 64, 8, 29568, vocab_size=152064),
    "HuggingFaceTB/SmolLM2-135M": _shape(_SMOL, 576, 30, 9, 3, 1536, tied=True),
    "HuggingFaceTB/SmolLM2-360M": _shape(_SMOL, 960, 32, 15, 5, 2560, tied=True),
    "HuggingFaceTB/SmolLM2-1.7B": _shape(_SMOL, 2048, 24, 32, 32, 8192, tied=True),
}
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    **_BASES,
    **{f"{name}-Instruct": shape for name, shape in _BASES.items()},
    "meta-llama/Llama-3.3-70B-Instruct": _BASES["meta-llama/Llama-3.1-70B"],
    "Qwen/Qwen3-0.6B": _shape(_QWEN3, 1024, 28, 16, 8, 3072, tied=True),
    "Qwen/Qwen3-1.7B": _shape(_QWEN3, 2048, 28, 16, 8, 6144, tied=True),
    "Qwen/Qwen3-4B": _shape(_QWEN3, 2560, 36, 32, 8, 9728, tied=True),
    "Qwen/Qwen3-8B": _shape(_QWEN3, 4096, 36, 32, 8, 12288),
    "Qwen/Qwen3-14B": _shape(_QWEN3, 5120, 40, 40, 8, 17408),
    "Qwen/Qwen3-32B": _shape(_QWEN3, 5120, 64, 64, 8, 25600),
    "mistralai/Mistral-7B-Instruct-v0.3": _shape(
        {"model_type": "mistral", "vocab_size": 32768, "max_position_embeddings": 32768}, 4096, 32, 32, 8, 14336
    ),
    "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2": _LLAMA_8B | _CLASSIFIER,
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B": _LLAMA_8B | _CLASSIFIER,
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": _shape(
        _QWEN3, 1024, 28, 16, 8, 3072, tied=True, num_labels=1, architectures=["Qwen3ForSequenceClassification"]
    ),
}
"""Hub name → the part of its config.json that determines memory."""


def model_config(path: str) -> PretrainedConfig:
    """The config of a model: of a folder its own, of a known hub name the shipped one, else the hub's.

    Args:
        path: Local folder or hub name.

    Raises:
        UserError: It cannot be read.
    """
    if path in KNOWN_MODELS and not Path(path).is_dir():
        shape = dict(KNOWN_MODELS[path])
        return AutoConfig.for_model(shape.pop("model_type"), **shape)
    return loading.load_config(path)
