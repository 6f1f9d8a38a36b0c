"""What rank 0 sends of a model before its weights."""

import pickle
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rlmt.distributed.rank_0_loading import _without_weights, load_on_rank_0, rank_0_loads

SHAPE: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "mistral", "qwen3_moe"])
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_received_model_computes_what_the_sent_one_does(family: str, auto: Any) -> None:
    torch.manual_seed(0)
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if family == "qwen3_moe" else {}
    config = CONFIG_MAPPING[family](**SHAPE, **more)
    sent = auto.from_config(config, attn_implementation="eager").eval()
    received = pickle.loads(pickle.dumps(_without_weights(sent)))
    assert all(p.is_meta for p in received.parameters()) and not any(p.is_meta for p in sent.parameters())
    assert len(list(received.parameters())) == len(list(sent.parameters()))  # tied weights count once
    received.load_state_dict(sent.state_dict(), assign=True)
    assert received.config._attn_implementation == "eager" and not received.training
    ids = torch.arange(1, 30).view(1, -1)
    assert torch.equal(received(ids).logits, sent(ids).logits)


def test_every_rank_loads_where_nothing_is_sharded() -> None:
    assert load_on_rank_0(lambda: 3) == 3
    with rank_0_loads(False):
        assert load_on_rank_0(lambda: 4) == 4
