"""PPO's two gradients against one big left-padded batch and the textbook formulas, for every kind of critic."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlmt.algorithms import PPO
from rlmt.models.adapters import CRITIC, LoRA, trainable_parameters, use_adapter
from rlmt.models.critic import Critic, build_critic
from rlmt.models.logprobs import compute_values
from rlmt.modules.update import PolicyUpdate
from rlmt.types import Experience, FinishReason, Prompt, RolloutBatch, Sampling, Scores

from .test_update import WAYS, set_way

TEMPERATURE, GAMMA, LAM = 0.7, 0.95, 0.9
LENGTHS = [1, 9, 4, 25, 2, 5]
CPU = torch.device("cpu")
KINDS = ["own", "shared", "shared with adapters"]


LORA = LoRA(rank=4, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


def model(adapters: bool = False) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=61, initializer_range=0.2, **sizes))
    if adapters:
        LORA.add_to(policy)
        for parameter in trainable_parameters(policy):
            torch.nn.init.normal_(parameter, std=0.1)  # adapters start without effect
    return policy


def pair(kind: str) -> tuple[Any, Critic]:
    """A policy and a critic whose values are far from 0."""
    lora = LORA if kind == "shared with adapters" else None
    policy = model(adapters=lora is not None)
    critic = build_critic(policy, shared=kind != "own", lora=lora)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if f".{CRITIC}." in name:
                parameter.normal_(std=0.1)
        critic.head.weight.normal_(std=0.3)
        critic.head.bias.fill_(0.2)
    return policy, critic


def experience() -> Experience:
    """Three prompts, two samples each, of very different lengths, one of them truncated."""
    make = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 61, (count,), generator=make).tolist()  # type: ignore[no-any-return]

    rollouts = RolloutBatch(
        prompts=[Prompt(i, [{"role": "user", "content": "?"}]) for i in range(3)],
        group_size=2,
        prompt_ids=[tokens(3), tokens(17), tokens(8)],
        completion_ids=[tokens(n) for n in LENGTHS],
        engine_logprobs=torch.full((sum(LENGTHS),), -4.0),
        finish=[FinishReason.STOP] * 3 + [FinishReason.LENGTH] + [FinishReason.STOP] * 2,
        sampling=Sampling(TEMPERATURE, 25),
        weight_version=0,
    )
    return Experience(
        rollouts=rollouts,
        texts=[],
        splits=[],
        thought_tokens=torch.zeros(6, dtype=torch.long),
        scores=Scores(torch.randn(6, generator=make), {}, []),
        group=torch.arange(3).repeat_interleave(2),
        lengths=torch.tensor(LENGTHS),
        engine_logprobs=rollouts.engine_logprobs,
    )


def moved(values: Tensor) -> Tensor:
    """Values as an earlier update would have left them, so that the value clip holds some."""
    return values + torch.randn(values.shape, generator=torch.Generator().manual_seed(1))


def padded(rollouts: RolloutBatch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """All samples in one batch padded on the left: inputs, the tokens [B, L-1] that are predicted, and which count."""
    rows = [rollouts.prompt_ids[i // 2] + c for i, c in enumerate(rollouts.completion_ids)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    attention = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    inputs = {
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
    }
    completion = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in rollouts.completion_ids])[:, 1:].bool()
    return inputs, ids[:, 1:], completion


def textbook(policy: Any, critic: Critic, data: Experience, counted: Tensor) -> tuple[Tensor, Tensor, float]:
    """Policy and value loss of the whole batch, and the share of clipped values; `counted`: samples in the loss."""
    inputs, tokens, completion = padded(data.rollouts)
    with use_adapter(policy, CRITIC) if hasattr(policy, "peft_config") else nullcontext():
        hidden = critic.backbone(**inputs).last_hidden_state[:, :-1]
    values = critic.head(hidden).squeeze(2)[completion]
    logprobs = torch.log_softmax(policy(**inputs).logits[:, :-1] / TEMPERATURE, -1)
    logprobs = logprobs.gather(2, tokens[:, :, None]).squeeze(2)[completion]
    old, take = moved(values.detach()), counted.repeat_interleave(torch.tensor(LENGTHS))
    advantages = torch.zeros_like(old)
    start = 0
    for sample, length in enumerate(LENGTHS):
        running = following = 0.0
        for t in reversed(range(start, start + length)):
            reward = data.scores.total[sample].item() if t == start + length - 1 else 0.0
            running = reward + GAMMA * following - old[t].item() + GAMMA * LAM * running
            following = old[t].item()
            advantages[t] = running
        start += length
    returns = advantages + old
    white = (advantages - advantages[take].mean()) / (advantages[take].std() + 1e-6)
    policy_loss = (-(logprobs - logprobs.detach()).exp() * white)[take].mean()
    near = old + (values - old).clamp(-0.5, 0.5)
    errors = torch.stack([(values - returns).square(), (near - returns).square()])[:, take]
    held = (errors[1] > errors[0]) & ((values - old).abs() > 0.5)[take]
    return policy_loss, errors.max(0).values.mean() / 2, float(held.float().mean())


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_both_gradients_are_those_of_one_big_padded_batch(kind: str, mask_truncated: bool, way: str) -> None:
    data, (policy, critic) = experience(), pair(kind)
    counted = torch.tensor([not mask_truncated or i != 3 for i in range(6)])
    policy_loss, value_loss, clipped = textbook(policy, critic, data, counted)
    assert 0 < clipped < 1
    (policy_loss + value_loss).backward()
    expected_policy, expected_critic = gradients(policy), gradients(critic)

    for part in (policy, critic.backbone):
        set_way(part, way)
    algorithm = PPO(GAMMA, LAM, kl_coef=0.0, entropy_coef=0.0, mask_truncated=mask_truncated)
    for budget in (1, 60, 100_000):
        policy.zero_grad(), critic.zero_grad()
        data.values = moved(compute_values(critic, data.rollouts, budget, CPU))
        algorithm.prepare(data)
        update = PolicyUpdate(algorithm, budget, max_grad_norm=1e9)
        (step,) = [
            (gradients(policy), gradients(critic), s.problem)
            for s in update.steps(policy, data, 0, lambda part: part.backward(), critic)
        ]
        same(step[0], expected_policy)
        same(step[1], expected_critic)
        assert step[2] is None
        metrics = update.metrics()
        assert metrics["policy/loss"] == pytest.approx(policy_loss.item(), rel=1e-4, abs=1e-6)
        assert metrics["critic/loss"] == pytest.approx(value_loss.item(), rel=1e-4)
        assert metrics["critic/clip_frac"] == pytest.approx(clipped)
        norm = sum(float(p.grad.square().sum()) for p in trainable_parameters(critic) if p.grad is not None) ** 0.5
        assert metrics["critic/grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_adapters_of_policy_and_critic_get_no_gradient_of_each_others_loss() -> None:
    data, (policy, critic) = experience(), pair("shared with adapters")
    data.values = compute_values(critic, data.rollouts, 100, CPU)
    algorithm = PPO(kl_coef=0.0)
    algorithm.prepare(data)
    for only, seen in ((True, {CRITIC}), (False, {"default"})):
        policy.zero_grad()
        update = PolicyUpdate(algorithm, 100, 1e9)
        beside = critic if only else None
        for _ in update.steps(policy, data, 0, lambda part: part.backward(), beside, lambda only=only: only):  # type: ignore[misc]
            names = [name for name, gradient in gradients(policy).items() if gradient.abs().sum() > 0]
        assert {name.split(".")[-2] for name in names} == seen
        assert len(names) == 2 * 3 * 2  # A and B of three layers in each of two blocks


@pytest.mark.parametrize("kind", KINDS)
def test_a_warm_up_step_leaves_the_policy_without_gradient(kind: str) -> None:
    data, (policy, critic) = experience(), pair(kind)
    data.values = compute_values(critic, data.rollouts, 100, CPU)
    algorithm = PPO(kl_coef=0.0)
    algorithm.prepare(data)
    update = PolicyUpdate(algorithm, 100, 1e9)
    (step,) = update.steps(policy, data, 0, lambda part: part.backward(), critic, lambda: True)
    assert step.problem is None
    assert all(p.grad is None for p in trainable_parameters(policy))
    learning = [p for p in trainable_parameters(critic) if p.grad is not None]
    assert len(learning) == {"own": 2 + 20, "shared": 2, "shared with adapters": 2 + 12}[kind]
    assert not any(name.startswith("policy/loss") for name in update.metrics())
