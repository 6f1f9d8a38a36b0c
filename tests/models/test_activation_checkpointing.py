"""Activation checkpointing changes memory and time of a backward pass, not its gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from rlmt.models import LoRA
from rlmt.models.activation_checkpointing import Checkpointing, enable_checkpointing

IDS = torch.arange(2 * 64).view(2, 64) % 61


def backward(mode: Checkpointing, lora: bool, autocast: bool, peak: Any) -> tuple[dict[str, Tensor], int, int]:
    """Gradients, floating-point operations and peak bytes of one forward and backward pass."""
    torch.manual_seed(0)
    sizes: Any = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    policy = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.2)).train()
    if lora:
        LoRA(rank=4).add_to(policy.bfloat16() if autocast else policy)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    enable_checkpointing(policy, mode)

    def step() -> None:
        policy.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = policy.get_decoder()(IDS, use_cache=False).last_hidden_state
        hidden.float().square().sum().backward()

    with FlopCounterMode(display=False) as flops:
        step()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return gradients, flops.get_total_flops(), peak(step)


@pytest.mark.parametrize(("lora", "autocast"), [(False, False), (True, True)], ids=["all", "lora, mixed"])
def test_selective_checkpointing_recomputes_no_matrix_product(lora: bool, autocast: bool, allocated_peak: Any) -> None:
    plain, selective, full = (backward(mode, lora, autocast, allocated_peak) for mode in (False, "selective", True))
    for gradients, _, _ in (selective, full):
        assert gradients.keys() == plain[0].keys() != set()
        scale = max(float(g.abs().max()) for g in plain[0].values())
        for name, gradient in plain[0].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)
    # Beside an adapter transformers also computes the gradient of the embeddings: four products of the first layer.
    embeddings = IDS.numel() * 2 * 3 * (64 * 64 + 4 * 64) if lora else 0
    assert selective[1] == plain[1] + embeddings < full[1]
    if not lora:  # frozen weights save few inputs, so keeping all products can take more
        assert full[2] < selective[2] < plain[2]
