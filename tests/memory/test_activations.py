"""Estimated bytes of activations against those of real models on real tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from rlmt.distributed.fsdp2 import round_residual_stream
from rlmt.memory.activations import BatchShape, forward_footprint, micro_batch_of, update_footprint
from rlmt.models.logprobs import token_logprobs

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}


def build(layers: int, lora: dict[str, Any] | None, dtype: torch.dtype, checkpointing: bool, qwen: bool) -> Any:
    config: Any = (Qwen2Config if qwen else LlamaConfig)(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=qwen)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    prepare(model, lora, checkpointing)
    return model


def prepare(model: Any, lora: dict[str, Any] | None, checkpointing: bool) -> None:
    if lora is not None:
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(**{"r": 8, "target_modules": "all-linear"} | lora), adapter_name="default")
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                if p is not None and p.requires_grad:
                    module._parameters[name] = torch.nn.Parameter(p.float())
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def saved_bytes(model: PreTrainedModel, shape: BatchShape, autocast: torch.dtype | None) -> int:
    """Bytes of the storages that autograd saves in a real forward, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autocast("cpu", autocast, enabled=autocast is not None, cache_enabled=False),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        token_logprobs(model, micro_batch_of(shape), 1.0)
        return sum(storage.nbytes() for storage in saved.values())


CASES = {
    "all parameters, shared prompt": ({"lora": None}, BatchShape(3, 80, 60, True), None),
    "all parameters, mixed, tied": ({"lora": None, "qwen": True}, BatchShape(3, 40, 60, False), torch.bfloat16),
    "checkpointed": ({"lora": None, "checkpointing": True}, BatchShape(3, 40, 60, False), None),
    "rounded residual stream, checkpointed": (
        {"lora": None, "checkpointing": True, "rounded": True},
        BatchShape(3, 40, 60, False),
        torch.bfloat16,
    ),
    "lora": ({"lora": {}}, BatchShape(3, 40, 60, False), None),
    "lora, dropout, mixed": (
        {"lora": {"lora_dropout": 0.1}, "bf16_weights": True},
        BatchShape(2, 80, 90, True),
        torch.bfloat16,
    ),
    "dora, checkpointed": ({"lora": {"use_dora": True}, "checkpointing": True}, BatchShape(3, 40, 60, False), None),
}


SLOW = ("all parameters, mixed, tied", "lora, dropout, mixed", "dora, checkpointed")


@pytest.mark.parametrize(
    ("case", "layers"),
    [
        *(pytest.param(case, 5, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES),
        pytest.param("lora", 2, marks=pytest.mark.slow),
    ],
)
def test_update_footprint_matches_real_tensors(case: str, layers: int, allocated_peak: Any) -> None:
    options, shape, autocast = CASES[case]
    dtype = torch.bfloat16 if options.get("bf16_weights") else torch.float32
    build_options = (options["lora"], dtype, options.get("checkpointing", False), options.get("qwen", False))
    with torch.device("meta"):
        meta = build(layers, *build_options)
    model = build(layers, *build_options)
    if options.get("rounded"):
        round_residual_stream(meta)
        round_residual_stream(model)
    estimate = update_footprint(meta, shape, autocast)
    assert estimate.saved == pytest.approx(saved_bytes(model, shape, autocast), rel=0.02)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def update() -> None:
        with torch.autocast("cpu", autocast, enabled=autocast is not None, cache_enabled=False):
            outputs = token_logprobs(model, micro_batch_of(shape), 1.0)
            (outputs.logprobs + outputs.entropy).sum().backward()

    assert estimate.peak == pytest.approx(allocated_peak(update), rel=0.15)


def test_saved_bytes_of_4_bit_policy_match_real_tensors(tmp_path: Path) -> None:
    config: Any = LlamaConfig(**SHAPE, num_hidden_layers=3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=options)
    prepare(model, {}, False)
    with torch.device("meta"):
        meta = build(3, {}, torch.bfloat16, False, False)
    shape = BatchShape(3, 40, 60, False)
    estimate = update_footprint(meta, shape, torch.bfloat16).saved
    assert estimate == pytest.approx(saved_bytes(model, shape, torch.bfloat16), rel=0.15)


def test_reward_forward_footprint_matches_real_tensors(allocated_peak: Any) -> None:
    config: Any = LlamaConfig(**SHAPE, num_hidden_layers=6, num_labels=1)
    with torch.device("meta"):
        meta = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    estimate = forward_footprint(meta, 4, 100)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    ids = torch.zeros(4, 100, dtype=torch.long)

    def score() -> None:
        with torch.no_grad():
            model.base_model(input_ids=ids, use_cache=False)

    assert estimate.peak == pytest.approx(allocated_peak(score), rel=0.15)
