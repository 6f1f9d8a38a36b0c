"""The update's gradient under LoRA: adapters get the formula's, with shared prompts and with checkpointed layers."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlmt.algorithms import GRPO
from rlmt.models import LoRA
from rlmt.models.adapters import trainable_parameters, use_adapter
from rlmt.models.logprobs import compute_logprobs
from rlmt.models.micro_batch import shares_prompts
from rlmt.modules.update import PolicyUpdate
from rlmt.types import Experience, FinishReason, Prompt, RolloutBatch, Sampling, Scores

CPU = torch.device("cpu")


def model(dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes, initializer_range=0.2)).train()
    LoRA(rank=4, dropout=dropout).add_to(policy)
    for p in trainable_parameters(policy):
        p.data += 0.1 * torch.randn(p.shape)
    return policy


def experience() -> Experience:
    make = torch.Generator().manual_seed(0)
    lengths = [1, 9, 4, 12, 2, 7]
    completions = [torch.randint(0, 61, (n,), generator=make).tolist() for n in lengths]
    prompts = [torch.randint(0, 61, (n,), generator=make).tolist() for n in (3, 17)]
    return Experience(
        rollouts=RolloutBatch(
            prompts=[Prompt(i, [{"role": "user", "content": "?"}]) for i in range(2)],
            group_size=3,
            prompt_ids=prompts,
            completion_ids=completions,
            engine_logprobs=torch.zeros(sum(lengths)),
            finish=[FinishReason.STOP] * 6,
            sampling=Sampling(0.7, 30),
            weight_version=0,
        ),
        texts=[],
        splits=[],
        thought_tokens=torch.zeros(6, dtype=torch.long),
        scores=Scores(torch.tensor([0.0, 1.0, -2.0, 0.5, 0.1, 3.0]), {}, []),
        group=torch.tensor([0, 0, 0, 1, 1, 1]),
        lengths=torch.tensor(lengths),
        engine_logprobs=torch.zeros(sum(lengths)),
    )


def one_by_one(policy: LlamaForCausalLM, rollouts: RolloutBatch) -> Tensor:
    """[T] log-probs by one plain forward a sample."""
    found = []
    for i, completion in enumerate(rollouts.completion_ids):
        prompt = rollouts.prompt_ids[i // rollouts.group_size]
        logits = policy(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
        found.append(torch.log_softmax(logits, -1)[range(len(completion)), completion])
    return torch.cat(found)


@pytest.mark.parametrize("budget", [20, 100_000])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["shared prompts", "checkpointed layers"])
def test_gradient_is_the_formulas_and_the_reference_is_the_base(budget: int, checkpointing: bool) -> None:
    data, policy = experience(), model()
    lp = one_by_one(policy, data.rollouts)
    with torch.no_grad(), use_adapter(policy, None):
        base = one_by_one(policy, data.rollouts)
    assert (base - lp).abs().max() > 0.1
    groups = data.scores.total.view(2, 3)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).flatten()
    k3 = (base - lp).exp() - 1 - (base - lp)
    (-(lp - lp.detach()).exp() * advantages.repeat_interleave(data.lengths) + 0.1 * k3).mean().backward()
    expected = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    assert all(".lora_" in name for name in expected) and len(expected) == 2 * 2 * 7
    policy.zero_grad()

    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    assert shares_prompts(policy) != checkpointing
    with use_adapter(policy, None):
        data.ref_logprobs = compute_logprobs(policy, data.rollouts, budget, CPU)
    torch.testing.assert_close(data.ref_logprobs, base, rtol=1e-5, atol=1e-5)
    algorithm = GRPO(kl_coef=0.1, entropy_coef=0.0)
    algorithm.prepare(data)
    update = PolicyUpdate(algorithm, budget, max_grad_norm=1e9)
    for step in update.steps(policy, data, 0, lambda part: part.backward()):
        assert step.problem is None
        scale = max(float(gradient.abs().max()) for gradient in expected.values())
        for name, p in policy.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-5 * scale, msg=name)
            else:
                assert p.grad is None


def test_passes_without_gradient_drop_nothing() -> None:
    """Old log-probs are those of the function that the engine samples from."""
    data, policy = experience(), model(dropout=0.5)
    got = compute_logprobs(policy, data.rollouts, 1000, CPU)
    assert policy.training
    with torch.no_grad():
        noisy = one_by_one(policy, data.rollouts)
        torch.testing.assert_close(got, one_by_one(policy.eval(), data.rollouts), rtol=1e-5, atol=1e-5)
    assert (noisy - got).abs().max() > 0.01
