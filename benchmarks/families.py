"""Tiny random models of many families that transformers supports, for the table in docs/reference/models.md."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 336
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS: dict[str, Any] = {"head_dim": 32}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR: dict[str, Any] = {
    "head_dim": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
_GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "n_inner": 96}
_HUB_LFM2: dict[str, Any] = {  # as in the models on the Hub; vLLM reads it, transformers does not
    "conv_dim": 64,
    "block_dim": 64,
    "block_multiple_of": 8,
    "block_auto_adjust_ff_dim": False,
    "block_ffn_dim_multiplier": 1.0,
}
_BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", _HEADS),
    "Mistral": ("mistral", _HEADS),
    "Gemma": ("gemma", _HEADS),
    "Gemma 2": ("gemma2", _HEADS),
    "Gemma 3": ("gemma3_text", _HEADS),
    "Phi": ("phi", {"attention_dropout": 0.1, "resid_pdrop": 0.1}),
    "Phi-3": ("phi3", {"attention_dropout": 0.1}),
    "Granite": ("granite", {"logits_scaling": 8.0, "embedding_multiplier": 2.0, "attention_dropout": 0.1}),
    "Cohere": ("cohere", {"logit_scale": 0.25}),
    "GPT-2": ("gpt2", _GPT),
    "GPT-J": ("gptj", _GPT | {"rotary_dim": 16}),
    "CodeGen": ("codegen", _GPT | {"n_head": 4, "rotary_dim": 8}),
    "OPT": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "Seed-OSS": ("seed_oss", _HEADS | {"attention_dropout": 0.1, "residual_dropout": 0.1}),
    "Mixtral": ("mixtral", _MOE | {"num_local_experts": 4}),
    "Qwen3-MoE": ("qwen3_moe", _HEADS | _MOE | {"num_experts": 4}),
    "gpt-oss": ("gpt_oss", _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "PhiMoE": ("phimoe", {"num_local_experts": 4}),
    "ERNIE 4.5 MoE": ("ernie4_5_moe", _MOE | {"moe_num_experts": 4, "moe_k": 2, "use_bias": True}),
    "DeepSeek-V3": (
        "deepseek_v3",
        _MOE
        | {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 512,  # vLLM's kernels have this size alone
            "q_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 64,
            "v_head_dim": 32,
            "num_key_value_heads": 2,
            "topk_method": "noaux_tc",  # as in the models on the Hub; vLLM reads it, transformers does not
        },
    ),
    "Qwen3-Next": ("qwen3_next", _LINEAR | _MOE | {"num_experts": 4, "shared_expert_intermediate_size": 32}),
    "Qwen3.5": ("qwen3_5_text", _LINEAR),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"]} | _HUB_LFM2),
    "Falcon-H1": ("falcon_h1", _MAMBA | {"mamba_d_ssm": 128, "lm_head_multiplier": 0.5}),
    "Mamba 2": ("mamba2", {"state_size": 16, "num_heads": 4, "head_dim": 32, "n_groups": 1}),
    "Llama 4": ("llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 96, "head_dim": 32}),
    "MiniCPM3": ("minicpm3", {"num_key_value_heads": 2}),
    "Inkling": ("inkling_text", {}),
    "BERT": ("bert", {}),
    "XLM": ("xlm", {"emb_dim": 32, "n_layers": 1, "n_heads": 2}),
    "BART": ("bart", _BART),
}
"""Name → transformers' model type, and options of its config besides the common sizes."""

_NO_SIZES = ("gpt2", "gptj", "codegen", "ctrl", "xlm", "bart")
"""Types whose config names its sizes in another way."""


def family_config(name: str) -> PretrainedConfig:
    """The config of a tiny model of a family."""
    model_type, own = FAMILIES[name]
    sizes = {k: v for k, v in _SIZES.items() if model_type not in _NO_SIZES or k in ("vocab_size", "initializer_range")}
    known = AutoConfig.for_model(model_type)
    config = AutoConfig.for_model(model_type, **{k: v for k, v in sizes.items() if hasattr(known, k)} | own)
    config.name_or_path = name
    return config


def family_model(name: str, auto: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """A tiny model of a family with random weights, biases and norms included, in eval mode.

    Args:
        name: Name of the family.
        auto: Auto class that builds it.
        **options: Attributes of the config to set.
    """
    torch.manual_seed(0)
    config = family_config(name)
    for key, value in options.items():
        setattr(config, key, value)
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()
