"""Weights as vLLM loads them: the names and pieces of a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlmt.engines.vllm_weights import VLLMWeights
from rlmt.models import LoRA
from rlmt.models.adapters import base_tensors

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts": 2, "moe_intermediate_size": 8}


def policy_of(family: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **options)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "tied", "head"),
    [("gemma2", True, False), ("gemma2", False, True), ("gemma3_text", True, True), ("llama", True, True)],
)
def test_a_tied_head_is_loaded_unless_vllm_has_none(family: str, tied: bool, head: bool) -> None:
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, tie_word_embeddings=tied))
    names = VLLMWeights(policy).names
    assert ("lm_head.weight" in names) is head and "model.embed_tokens.weight" in names


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "llama"])
def test_weights_are_those_of_a_saved_checkpoint(family: str, tmp_path: Path) -> None:
    policy = policy_of(family, **(EXPERTS if family != "llama" else {}))
    policy.save_pretrained(tmp_path)
    loaded = VLLMWeights(AutoModelForCausalLM.from_pretrained(tmp_path))
    missing = set(loaded.names)
    found = dict(loaded.load(policy.state_dict().items(), missing))
    saved = load_file(tmp_path / "model.safetensors")
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
    assert not missing
    experts = sum(".experts.1." in name for name in saved)
    assert experts == (0 if family == "llama" else 3)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_shapes_are_those_of_the_weights_as_loaded(family: str) -> None:
    policy = policy_of(family, **(EXPERTS if family != "llama" else {}))
    LoRA(rank=2, target_modules=["q_proj"]).add_to(policy)
    weights = VLLMWeights(policy)
    loaded = [(name, tuple(tensor.shape)) for name, tensor in weights.load_all(base_tensors(policy).items())]
    assert weights.shapes(policy) == loaded and len(loaded) > 10


def test_only_known_weights_are_loaded() -> None:
    policy = policy_of("llama")
    loaded, (known, *others) = VLLMWeights(policy), policy.state_dict()
    missing = set(loaded.names)
    given = {known: torch.zeros(1), "extra": torch.zeros(1)}
    assert [name for name, _ in loaded.load(given.items(), missing)] == [known]
    assert missing == set(others)
