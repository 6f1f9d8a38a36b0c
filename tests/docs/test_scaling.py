"""The calculated figures of docs/scaling.md follow from the shapes of the models."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from rlmt.models.quantization import nf4_bytes

TEXT = (Path(__file__).parents[2] / "docs/scaling.md").read_text(encoding="utf-8")
RANK, RANKS, MICRO_BATCHES = 16, 8, 16
SIZES = {"8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64)}  # hidden, feed-forward, layers, heads


def build(kind: type[PreTrainedModel], name: str) -> PreTrainedModel:
    hidden, ffn, layers, heads = SIZES[name]
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        num_labels=1,
    )
    with torch.device("meta"):
        return kind(config)


def linear_layers(model: PreTrainedModel) -> list[nn.Linear]:
    return [layer for layer in model.base_model.modules() if isinstance(layer, nn.Linear)]


def nf4_model_bytes(model: PreTrainedModel) -> float:
    linear = sum(layer.weight.numel() for layer in linear_layers(model))
    return nf4_bytes(linear, True) + 2 * (model.num_parameters() - linear)


@pytest.mark.parametrize("name", SIZES)
def test_table_of_traffic_and_memory_is_calculated(name: str) -> None:
    policy, reward = build(LlamaForCausalLM, name), build(LlamaForSequenceClassification, "8B")
    size, reward_bytes = policy.num_parameters(), 2 * reward.num_parameters()
    linear = sum(layer.weight.numel() for layer in linear_layers(policy))
    # Under bf16-mixed the reference's linear weights, its head included, are in bfloat16.
    reference = 4 * size - 2 * (linear + policy.get_output_embeddings().weight.numel())
    adapter = sum(RANK * (layer.in_features + layer.out_features) for layer in linear_layers(policy))
    ring = 2 * (RANKS - 1) / RANKS
    gathered = ((10 * MICRO_BATCHES + 4) * size + MICRO_BATCHES * reward_bytes) * (RANKS - 1) / RANKS
    expected = {
        "all": (4 * size * ring, 2 * size, (20 + 2) * size + reference + reward_bytes),
        "all, `fsdp`": (gathered, 2 * size, (16 * size + reference + reward_bytes) / RANKS + 2 * size),
        "all, `fsdp` and `offload`": (gathered, 2 * size, 2 * size),
        "`lora`": (4 * adapter * ring, 2 * size + 4 * adapter, 20 * adapter + 4 * size + reward_bytes),
        "`qlora`": (
            *(4 * adapter * ring, 2 * size + 4 * adapter),
            14 * adapter + nf4_model_bytes(policy) + nf4_model_bytes(reward) + linear + 2 * (size - linear),
        ),
    }
    if name == "70B":
        expected["`lora`, `fsdp`, t = 8"] = (
            ((6 * MICRO_BATCHES + 2) * size + MICRO_BATCHES * reward_bytes) * (RANKS - 1) / RANKS + 4 * adapter * ring,
            2 * size / RANKS + 4 * adapter,
            16 * adapter + (4 * size + reward_bytes) / RANKS,
        )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TEXT.splitlines() if line.startswith("|")]
    found = {row[1]: [float(cell.replace(",", "")) for cell in row[2:]] for row in rows if row[0] == name}
    assert found.keys() == expected.keys()
    for trained, gigabytes in found.items():
        for got, bytes_ in zip(gigabytes, expected[trained], strict=True):
            assert got == pytest.approx(bytes_ / 1e9, rel=0.01, abs=0.06)


def test_traffic_of_tensor_parallel_vllm_is_calculated() -> None:
    hidden, _, layers, _ = SIZES["70B"]
    token = layers * 2 * 2 * (RANKS - 1) / RANKS * 2 * hidden  # two ring all-reduces in 2 bytes
    sent = 512 * 4000 * token
    assert f"That is {token / 1e6:.1f} MB for 70B and t = 8, so {sent / 1e12:.1f} TB" in TEXT
    assert f"{sent / 450e9:.0f} s of NVLink" in TEXT and sent / 50e9 == pytest.approx(180, rel=0.1)
