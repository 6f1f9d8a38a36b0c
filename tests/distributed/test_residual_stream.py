"""Hidden states between blocks in bfloat16: in every family, with gradients in the dtype of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from rlmt.distributed.fsdp2 import round_residual_stream
from rlmt.models.critic import build_critic

SIZES: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "initializer_range": 0.1, "max_position_embeddings": 64},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},  # positions are added to embeddings
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},  # experts are weighted in float32
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 8},  # blocks return a tuple
}


def model(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family])
    built = AutoModelForCausalLM.from_config(config).train()  # type: ignore[no-untyped-call]
    built.gradient_checkpointing_enable({"use_reentrant": False})
    return built


def gradient(trained: Any, autocast: bool) -> tuple[Tensor, set[torch.dtype]]:
    """The whole gradient of a loss, and the dtypes of the hidden states that blocks receive and return."""
    seen: set[torch.dtype] = set()

    def watch(block: Any, args: Any, output: Any) -> None:
        seen.update((args[0].dtype, (output if isinstance(output, Tensor) else output[0]).dtype))

    for block in trained.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.register_forward_hook(watch)
    ids = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = trained(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    assert all(p.grad.dtype == torch.float32 for p in trained.parameters() if p.grad is not None)
    return torch.cat([p.grad.flatten() for p in trained.parameters() if p.grad is not None]), seen


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_gets_and_gives_bfloat16_and_gradients_stay_close(family: str) -> None:
    expected, _ = gradient(model(family), autocast=False)
    mixed, dtypes = gradient(model(family), autocast=True)
    assert torch.float32 in dtypes
    rounded = model(family)
    round_residual_stream(rounded)
    found, dtypes = gradient(rounded, autocast=True)
    # The first block's input is rounded by a hook of its own, which comes before the one that watches.
    assert dtypes == {torch.bfloat16}
    assert (mixed - expected).norm() < (found - expected).norm() * 1.2 < 0.1 * expected.norm()


@pytest.mark.parametrize("shared", [False, True])
def test_a_critic_has_it_with_its_backbone(shared: bool) -> None:
    policy = model("llama")
    critic = build_critic(policy, shared=shared)
    for part in (policy, critic):
        round_residual_stream(part)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = critic.backbone(input_ids=torch.tensor([[1, 2]]), output_hidden_states=True).hidden_states
    assert {states.dtype for states in hidden[:-1]} == {torch.bfloat16}
