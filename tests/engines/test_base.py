"""Helpers that the engines share."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlmt.engines.base import names_for_vllm, track_loaded

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.mark.parametrize(
    ("family", "tied", "head"),
    [("gemma2", True, False), ("gemma2", False, True), ("gemma3_text", True, True), ("llama", True, True)],
)
def test_a_tied_head_is_loaded_unless_vllm_has_none(family: str, tied: bool, head: bool) -> None:
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, tie_word_embeddings=tied))
    assert ("lm_head.weight" in names_for_vllm(policy)) is head
    assert "model.embed_tokens.weight" in names_for_vllm(policy)


def test_only_named_weights_are_loaded() -> None:
    weights = {name: torch.zeros(1) for name in "abc"}
    missing = {"a", "d"}
    assert [name for name, _ in track_loaded(weights.items(), frozenset("ad"), missing)] == ["a"]
    assert missing == {"d"}
