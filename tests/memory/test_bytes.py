"""Bytes computed from shapes against those of real models, optimizers and logits."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen2Config

from rlmt.memory.activations import BatchShape
from rlmt.memory.bytes import (
    kv_bytes,
    largest_micro_batch,
    logits_bytes,
    optimizer_bytes,
    optimizer_step_bytes,
    tensor_bytes,
    weight_bytes,
)
from rlmt.models.output_head import LOGITS_PER_CHUNK, OutputHead, linear_logprobs
from rlmt.models.quantization import nf4_bytes, quantized_weights

SHAPE: dict[str, Any] = {
    "vocab_size": 700,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "qwen2, tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
}


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages of tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def model_bytes(model: nn.Module) -> int:
    """Bytes of a real model's parameters and buffers, quantization states included."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code]
            if state.nested:
                tensors += [state.offset, state.state2.absmax, state.state2.code]
    return storage_bytes(tensors)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("double_quant", [None, False, True])
def test_weight_bytes_match_real_models(name: str, double_quant: bool | None, tmp_path: Path) -> None:
    config: Any = CONFIGS[name]
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    options: dict[str, Any] = {}
    if double_quant is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant
        )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **options)
    quantized = () if double_quant is None else quantized_weights(config)
    assert weight_bytes(meta, quantized, bool(double_quant)) == pytest.approx(model_bytes(model), rel=0.005)


def test_nf4_bytes_match_hand_computation() -> None:
    # 4096 × 4096 weights: 2^23 bytes of weights; 2^18 scales in float32; 16 float32 codes.
    assert nf4_bytes(2**24, False) == 2**23 + 4 * 2**18 + 64
    # Double quantization: 2^18 scales of a byte, 2^10 scales of scales, 256 codes of theirs and their mean.
    assert nf4_bytes(2**24, True) == 2**23 + 2**18 + 4 * 2**10 + 64 + 1024 + 4


OPTIMIZERS = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-3),
    "SGD": partial(torch.optim.SGD, lr=1e-3),
    "SGD, momentum": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "AdamW8bit": partial(bitsandbytes.optim.AdamW8bit, lr=1e-3),
    "PagedAdamW8bit": partial(bitsandbytes.optim.PagedAdamW8bit, lr=1e-3),
}


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_bytes_match_real_states(name: str) -> None:
    factory = OPTIMIZERS[name]
    shapes = [(512, 600), (256, 300), (64, 80), (16, 96), (33,)]  # some are too small for 8-bit states
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = factory([{"params": parameters}])
    optimizer.step()
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    estimate = optimizer_bytes(factory, [torch.empty(shape, device="meta") for shape in shapes])
    assert estimate == pytest.approx(storage_bytes(states), rel=0.02)


def test_foreach_step_takes_the_size_of_the_trained_tensors() -> None:
    trained = [torch.empty(100, 100, device="meta")]
    assert optimizer_step_bytes(OPTIMIZERS["AdamW"], trained) == tensor_bytes(trained) == 40_000
    assert optimizer_step_bytes(partial(torch.optim.AdamW, fused=True), trained) == 0
    assert optimizer_step_bytes(partial(torch.optim.AdamW, foreach=False), trained) == 0
    assert optimizer_step_bytes(OPTIMIZERS["AdamW8bit"], trained) == 0


@pytest.mark.parametrize("compute", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("soft_cap", [None, pytest.param(30.0, marks=pytest.mark.slow)])
def test_logits_bytes_match_the_allocated_peak(
    compute: torch.dtype, soft_cap: float | None, allocated_peak: Any
) -> None:
    tokens, vocabulary, width = 600, 2**17, 8
    hidden = torch.randn(tokens, width, dtype=compute, requires_grad=True)
    head = torch.randn(vocabulary, width, dtype=compute)
    targets = torch.zeros(tokens, dtype=torch.long)

    def work() -> None:
        chunk = LOGITS_PER_CHUNK // vocabulary
        outputs = linear_logprobs(hidden, OutputHead(head, soft_cap=soft_cap), targets, 1.0, chunk)
        (outputs.logprobs + outputs.entropy).sum().backward()

    assert logits_bytes(tokens, OutputHead(head, soft_cap=soft_cap), compute, None) == pytest.approx(
        allocated_peak(work), rel=0.15
    )
    assert logits_bytes(10, OutputHead(head), torch.float32, None) == 10 * vocabulary * 8
    assert logits_bytes(600, OutputHead(head), torch.bfloat16, 24 * 2**30) == 256 * vocabulary * 10


def test_kv_bytes_match_hand_computation() -> None:
    llama = LlamaConfig(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8)
    assert kv_bytes(llama, torch.bfloat16) == 2 * 32 * 8 * 128 * 2 == 128 * 2**10


def test_largest_micro_batch_fills_the_token_budget() -> None:
    def size(shape: BatchShape) -> int:
        return shape.rows * shape.row_length + (shape.prompt if shape.shared_prefix else 0)

    assert largest_micro_batch(16384, 1024, 4096, 512, 8, False) == BatchShape(4, 1024, 3073, False)  # 4 × 4096 tokens
    assert size(largest_micro_batch(16384, 1024, 4096, 512, 8, False)) == 16384
    # A single sample may exceed the budget.
    assert largest_micro_batch(2048, 1024, 4096, 512, 8, False) == BatchShape(1, 1024, 4096, False)
    # A step has no more samples.
    assert largest_micro_batch(16384, 100, 100, 8, 4, False) == BatchShape(8, 100, 100, False)
    assert largest_micro_batch(6000, 4000, 1000, 64, 8, False) == BatchShape(1, 4000, 1000, False)
    # 1024 + 4 × 3840 = 16384
    assert largest_micro_batch(16384, 1024, 4096, 512, 8, True) == BatchShape(4, 1024, 3840, True)
    # A prompt has no more samples than its group.
    assert largest_micro_batch(16384, 1024, 256, 512, 8, True) == BatchShape(8, 1024, 256, True)


@pytest.mark.parametrize(
    ("vocabulary", "precision"), [pytest.param(500, "mixed", marks=pytest.mark.slow), (32000, "plain")]
)
def test_all_gather_bytes_match_torchs_fsdp2_tracker(
    vocabulary: int, precision: str, run_ranks: Callable[..., None], tmp_path: Path
) -> None:
    """Once where blocks dominate, once where embeddings do."""
    script, result = Path(__file__).with_name("sharded_memory.py"), tmp_path / "bytes.json"
    run_ranks(script, vocabulary, precision == "mixed", result, ranks=1)
    bytes_ = json.loads(result.read_text())
    assert bytes_["found"] > 30e6
    assert bytes_["expected"] == pytest.approx(bytes_["found"], rel=0.06)
