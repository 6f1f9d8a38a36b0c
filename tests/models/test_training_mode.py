"""Training without the config's dropout: log-probs of the update equal those in eval mode."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, SeedOssConfig, SeedOssForCausalLM

from rlmt.models import LoRA
from rlmt.models.logprobs import compute_logprobs, token_logprobs
from rlmt.models.micro_batch import micro_batches, shares_prompts
from rlmt.models.training_mode import eval_mode, recomputes_activations, set_training_mode
from rlmt.types import RolloutBatch, Sampling

CPU = torch.device("cpu")
ROLLOUTS = RolloutBatch(
    prompts=[],
    group_size=2,
    prompt_ids=[[1, 2, 3], [4]],
    completion_ids=[[10, 11], [12, 13, 14, 15, 16, 17], [18], [19]],
    engine_logprobs=torch.zeros(10),
    finish=[],
    sampling=Sampling(0.7, 8),
    weight_version=0,
)


def model(family: str) -> Any:
    torch.manual_seed(0)
    if family == "GPT-2":  # attn_pdrop, embd_pdrop and resid_pdrop are 0.1 by default
        config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
        return GPT2LMHeadModel(config)
    if family == "OPT":  # drops whole layers, too
        sizes = {"ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
        return OPTForCausalLM(
            OPTConfig(vocab_size=61, hidden_size=32, word_embed_proj_dim=32, layerdrop=0.5, init_std=0.3, **sizes)
        )
    sizes = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return SeedOssForCausalLM(
        SeedOssConfig(vocab_size=61, hidden_size=32, head_dim=8, attention_dropout=0.1, residual_dropout=0.1, **sizes)
    )


def logprobs(policy: Any) -> torch.Tensor:
    parts = {}
    for batch in micro_batches(ROLLOUTS, range(4), 1000, shares_prompts(policy), CPU):
        split = token_logprobs(policy, batch, 0.7).logprobs.split([ROLLOUTS.lengths[i] for i in batch.samples])
        parts |= dict(zip(batch.samples, split, strict=True))
    return torch.cat([parts[i] for i in range(4)])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["GPT-2", "OPT", "Seed-OSS"])
def test_first_ratio_is_one_without_dropout_and_not_with_it(family: str, checkpointing: bool) -> None:
    policy = model(family)
    set_training_mode(policy, checkpointing, dropout=False)
    assert recomputes_activations(policy) == checkpointing == (not shares_prompts(policy))
    old = compute_logprobs(policy, ROLLOUTS, 1000, CPU)
    new = logprobs(policy)
    torch.testing.assert_close((new - old).exp(), torch.ones(10), rtol=0, atol=1e-5)
    new.sum().backward()
    without = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    policy.gradient_checkpointing_disable()
    policy.eval()
    logprobs(policy).sum().backward()
    scale = max(float(gradient.abs().max()) for gradient in without.values())
    for name, p in policy.named_parameters():  # recomputed layers are in eval mode as well
        torch.testing.assert_close(without[name], p.grad, rtol=1e-4, atol=1e-5 * scale)
    set_training_mode(policy, checkpointing, dropout=True)
    assert ((logprobs(policy) - old).exp() - 1).abs().max() > 0.01


def test_layers_recompute_again_after_backward_and_after_eval_mode() -> None:
    policy = model("GPT-2")
    for _ in range(2):  # policy and critic can share layers
        set_training_mode(policy, gradient_checkpointing=True, dropout=False)
    assert len(policy.transformer.h[0]._forward_pre_hooks) == 1
    calls = []
    policy.transformer.h[0].mlp.register_forward_pre_hook(lambda module, _: calls.append(module.training))
    for _ in range(2):
        with eval_mode(policy), torch.no_grad():
            logprobs(policy)
        calls.clear()
        logprobs(policy).sum().backward()
        assert calls == [False] * 2 * len(list(micro_batches(ROLLOUTS, range(4), 1000, False, CPU)))
        assert recomputes_activations(policy)


def test_adapter_keeps_its_own_dropout() -> None:
    policy = model("Seed-OSS")
    LoRA(rank=4, dropout=0.5, target_modules=["q_proj"]).add_to(policy)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p += 0.3
    set_training_mode(policy, gradient_checkpointing=False, dropout=False)
    old = compute_logprobs(policy, ROLLOUTS, 1000, CPU)
    assert (logprobs(policy) - old).abs().max() > 1e-3
    for layer in policy.modules():
        for dropout in getattr(layer, "lora_dropout", {}).values():
            dropout.p = 0.0
    torch.testing.assert_close(logprobs(policy), old, rtol=0, atol=1e-5)
