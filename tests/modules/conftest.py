"""A model small enough for closed forms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel


@pytest.fixture(scope="session")
def small_llama() -> Callable[..., Any]:
    """`small_llama(LlamaForCausalLM, **config)`: two layers, 61 tokens, always the same weights."""

    def make(kind: type[PreTrainedModel], **options: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48}
        layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
        return kind(LlamaConfig(**shape, **layers, **options))

    return make
