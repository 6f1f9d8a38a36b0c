"""What the plan foretells of activations against what real models on real tensors take."""

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

from rlmt.memory.activations import BatchShape, _micro_batch, forward_footprint, update_footprint
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


def saved_bytes(model: PreTrainedModel, tokens: BatchShape, autocast: torch.dtype | None) -> int:
    """Unique storages that autograd packs in a real forward, those of the model left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autocast("cpu", autocast, enabled=autocast is not None, cache_enabled=False),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        token_logprobs(model, _micro_batch(tokens), 1.0)
        return sum(storage.nbytes() for storage in kept.values())


CASES = {
    "all parameters, shared prompt": ({"lora": None}, BatchShape(3, 80, 60, True), None),
    "all parameters, mixed, tied": ({"lora": None, "qwen": True}, BatchShape(3, 40, 60, False), torch.bfloat16),
    "checkpointed": ({"lora": None, "checkpointing": True}, BatchShape(3, 40, 60, False), None),
    "lora": ({"lora": {}}, BatchShape(3, 40, 60, False), None),
    "lora, dropout, mixed": (
        {"lora": {"lora_dropout": 0.1}, "held": True},
        BatchShape(2, 80, 90, True),
        torch.bfloat16,
    ),
    "dora, checkpointed": ({"lora": {"use_dora": True}, "checkpointing": True}, BatchShape(3, 40, 60, False), None),
}


@pytest.mark.parametrize(("case", "layers"), [*((case, 5) for case in CASES), ("lora", 2)])
def test_update(case: str, layers: int, allocated_peak: Any) -> None:
    options, tokens, autocast = CASES[case]
    dtype = torch.bfloat16 if options.get("held") else torch.float32
    shape = (options["lora"], dtype, options.get("checkpointing", False), options.get("qwen", False))
    with torch.device("meta"):
        shadow = build(layers, *shape)
    foretold = update_footprint(shadow, tokens, autocast)
    model = build(layers, *shape)
    assert foretold.kept == pytest.approx(saved_bytes(model, tokens, autocast), rel=0.02)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def update() -> None:
        with torch.autocast("cpu", autocast, enabled=autocast is not None, cache_enabled=False):
            outputs = token_logprobs(model, _micro_batch(tokens), 1.0)
            (outputs.logprobs + outputs.entropy).sum().backward()

    assert foretold.peak == pytest.approx(allocated_peak(update), rel=0.15)


def test_activations_of_a_policy_in_4_bits(tmp_path: Path) -> None:
    config: Any = LlamaConfig(**SHAPE, num_hidden_layers=3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=options)
    prepare(model, {}, False)
    with torch.device("meta"):
        shadow = build(3, {}, torch.bfloat16, False, False)
    tokens = BatchShape(3, 40, 60, False)
    foretold = update_footprint(shadow, tokens, torch.bfloat16).kept
    assert foretold == pytest.approx(saved_bytes(model, tokens, torch.bfloat16), rel=0.15)


def test_a_reward_models_forward(allocated_peak: Any) -> None:
    config: Any = LlamaConfig(**SHAPE, num_hidden_layers=6, num_labels=1)
    with torch.device("meta"):
        shadow = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    foretold = forward_footprint(shadow, 4, 100)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    ids = torch.zeros(4, 100, dtype=torch.long)
    mask = (torch.arange(100) < torch.tensor([[100], [90], [80], [70]])).long()

    def score() -> None:
        with torch.no_grad():
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)

    assert foretold.peak == pytest.approx(allocated_peak(score), rel=0.15)
