"""The update's gradient against one big left-padded batch and the textbook formula."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlmt.algorithms import GRPO
from rlmt.models.logprobs import compute_logprobs
from rlmt.models.micro_batch import shares_prompts
from rlmt.models.rows import packs_rows
from rlmt.models.varlen import VARLEN, register_varlen
from rlmt.modules.update import PolicyUpdate
from rlmt.types import Experience, FinishReason, Prompt, RolloutBatch, Sampling, Scores

TEMPERATURE = 0.7


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def experience(seed: int = 0) -> Experience:
    """Three prompts, four samples each, of very different lengths."""
    make = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 61, (count,), generator=make).tolist()  # type: ignore[no-any-return]

    lengths = [1, 9, 4, 30, 2, 2, 17, 8, 5, 1, 12, 3]
    prompts = [tokens(3), tokens(21), tokens(8)]
    total = sum(lengths)
    rollouts = RolloutBatch(
        prompts=[Prompt(i, [{"role": "user", "content": "?"}]) for i in range(3)],
        group_size=4,
        prompt_ids=prompts,
        completion_ids=[tokens(n) for n in lengths],
        engine_logprobs=torch.randn(total, generator=make) * 0.1 - 4,
        finish=[FinishReason.STOP] * 12,
        sampling=Sampling(TEMPERATURE, 30),
        weight_version=0,
    )
    return Experience(
        rollouts=rollouts,
        texts=[],
        splits=[],
        thought_tokens=torch.zeros(12, dtype=torch.long),
        scores=Scores(torch.randn(12, generator=make), {}, []),
        group=torch.arange(3).repeat_interleave(4),
        lengths=torch.tensor(lengths),
        engine_logprobs=rollouts.engine_logprobs,
    )


WAYS = ["shared prompts", "checkpointed layers", "packed rows", "packed rows, checkpointed layers"]
"""Ways in which samples go through the policy."""


def set_way(policy: PreTrainedModel, way: str) -> None:
    """Prepares a model to compute in one of the ways."""
    if "packed" in way:
        register_varlen()
        policy.set_attn_implementation(VARLEN)
    if "checkpointed" in way:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()


def padded_logprobs(policy: LlamaForCausalLM, rollouts: RolloutBatch) -> tuple[Tensor, Tensor]:
    """All samples in one batch padded on the left with an attention mask: [B, L] log-probs and completion mask."""
    rows = [rollouts.prompt_ids[i // rollouts.group_size] + c for i, c in enumerate(rollouts.completion_ids)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    attention = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    logits = policy(input_ids=ids, attention_mask=attention, position_ids=positions).logits[:, :-1] / TEMPERATURE
    logprobs = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None]).squeeze(2)
    completion = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in rollouts.completion_ids])[:, 1:].bool()
    return logprobs, completion


def gradients(policy: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("budget", [1, 60, 100_000])
@pytest.mark.parametrize("way", WAYS)
def test_gradient_is_that_of_one_big_padded_batch(aggregation: Any, budget: int, way: str) -> None:
    data = experience()
    algorithm = GRPO(loss_aggregation=aggregation, kl_coef=0.1, entropy_coef=0.0)
    policy, reference = model(0), model(1)
    lp, mask = padded_logprobs(policy, data.rollouts)
    with torch.no_grad():
        ref = padded_logprobs(reference, data.rollouts)[0]
    rewards = data.scores.total.view(3, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)).flatten()[:, None]
    k3 = (ref - lp).exp() - 1 - (ref - lp)
    token_loss = -(lp - lp.detach()).exp() * advantages + 0.1 * k3
    sums = (token_loss * mask).sum(1)
    loss = {
        "token_mean": sums.sum() / mask.sum(),
        "sequence_mean": (sums / mask.sum(1)).mean(),
        "constant": sums.mean() / 30,
    }[aggregation]
    loss.backward()
    expected = gradients(policy)
    policy.zero_grad()

    set_way(policy, way)
    set_way(reference, way)
    assert shares_prompts(policy) == (way == "shared prompts") and packs_rows(policy) == ("packed" in way)
    data.ref_logprobs = compute_logprobs(reference, data.rollouts, budget, torch.device("cpu"))
    algorithm.prepare(data)
    update = PolicyUpdate(algorithm, budget, max_grad_norm=1e9)
    (step,) = [gradients(policy) for _ in update.steps(policy, data, 0, lambda part: part.backward())]
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(step[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)
    metrics = update.metrics()
    assert metrics["policy/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["policy/kl"] == pytest.approx((k3[mask].mean()).item(), rel=1e-4)
    gap = lp[mask] - data.engine_logprobs
    assert metrics["engine/mismatch_max"] == pytest.approx(gap.abs().max().item(), rel=1e-4)
    assert metrics["engine/mismatch_kl"] == pytest.approx((gap.exp() - 1 - gap).mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["off_policy", "rounded"])
def test_samples_of_other_weights_are_weighted_by_truncated_importance(kind: str) -> None:
    """Token by token over two update epochs with a real step between them, against autograd on plain formulas."""
    data, policy, twin = experience(), model(0), model(0)
    setattr(data.rollouts, kind, True)
    behaviour_policy = model(2)
    with torch.no_grad():
        behaviour, mask = padded_logprobs(behaviour_policy, data.rollouts)
        old = padded_logprobs(policy, data.rollouts)[0]
    data.engine_logprobs = data.rollouts.engine_logprobs = behaviour[mask]
    algorithm = GRPO(kl_coef=0.0, entropy_coef=0.0, clip_low=0.02, clip_high=0.03, dual_clip=None, update_epochs=2)
    data.old_logprobs = compute_logprobs(policy, data.rollouts, 60, torch.device("cpu"))
    algorithm.prepare(data)
    update = PolicyUpdate(algorithm, 60, max_grad_norm=1e9)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (policy, twin)]
    rewards = data.scores.total.view(3, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)).flatten()[:, None]
    weight = torch.minimum((old - behaviour).exp(), torch.tensor(2.0))
    assert 0.1 < (weight[mask] == 2).float().mean() < 0.9  # some are truncated
    clipped = 0
    for _ in update.steps(policy, data, 0, lambda part: part.backward()):
        ratio = (padded_logprobs(twin, data.rollouts)[0] - old).exp()
        kept = torch.minimum(ratio * advantages, ratio.clamp(0.98, 1.03) * advantages)
        clipped += int(((kept != ratio * advantages) & mask).sum())
        (-(weight * kept)[mask].sum() / mask.sum()).backward()
        expected, got = gradients(twin), gradients(policy)
        scale = max(float(g.abs().max()) for g in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert clipped > 0
    metrics = update.metrics()
    assert metrics["engine/importance_mean"] == pytest.approx(weight[mask].mean().item(), rel=1e-4)
    assert metrics["engine/importance_capped"] == pytest.approx((weight[mask] == 2).float().mean().item())
    size = weight[mask].sum() ** 2 / (mask.sum() * weight[mask].square().sum())
    assert metrics["engine/effective_sample_size"] == pytest.approx(size.item(), rel=1e-4) and size < 0.95
    assert "engine/importance_square" not in metrics
    # The engine's weights are the policy's in fewer bits, so the gap to the trainer means something.
    assert ("engine/mismatch_kl" in metrics) == (kind == "rounded")


def test_first_pass_gives_log_probs_in_the_order_of_the_samples() -> None:
    data, policy = experience(), model()
    with torch.no_grad():
        lp, mask = padded_logprobs(policy, data.rollouts)
    got = compute_logprobs(policy, data.rollouts, 64, torch.device("cpu"))
    torch.testing.assert_close(got, lp[mask], rtol=1e-5, atol=1e-5)


def test_the_gradient_is_clipped_to_the_norm() -> None:
    data, policy, algorithm = experience(), model(), GRPO(kl_coef=0.0)
    algorithm.prepare(data)
    update = PolicyUpdate(algorithm, 100, max_grad_norm=0.01)
    norms = []
    for _ in update.steps(policy, data, 0, lambda part: part.backward()):
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients(policy).values())))
    assert norms == [pytest.approx(0.01, rel=1e-3)]
    assert update.metrics()["policy/grad_norm"] > 0.01


def test_epochs_and_minibatches_see_every_sample_once_an_epoch() -> None:
    data, policy = experience(), model()
    algorithm = GRPO(kl_coef=0.0, entropy_coef=0.0, update_epochs=3, minibatches=3, loss_aggregation="constant")
    data.old_logprobs = compute_logprobs(policy, data.rollouts, 100, torch.device("cpu"))
    algorithm.prepare(data)
    update = PolicyUpdate(algorithm, 100, 1e9)
    steps = []
    for _ in update.steps(policy, data, 7, lambda part: part.backward()):
        steps.append(gradients(policy))
        policy.zero_grad()
    assert len(steps) == 9
    # No optimizer step was taken between them, so an epoch's three gradients add up to three times the whole batch's.
    whole = PolicyUpdate(GRPO(kl_coef=0.0, entropy_coef=0.0, loss_aggregation="constant"), 100, 1e9)
    (full,) = [gradients(policy) for _ in whole.steps(policy, data, 0, lambda part: part.backward())]
    for name, gradient in full.items():
        for epoch in range(3):
            total = sum(step[name] for step in steps[3 * epoch : 3 * epoch + 3])
            torch.testing.assert_close(total, 3 * gradient, rtol=1e-4, atol=1e-6)


def test_masked_samples_leave_the_gradient_alone() -> None:
    policy = model()
    algorithm = GRPO(kl_coef=0.0, entropy_coef=0.01, mask_truncated=True)
    results = []
    for seed in (0, 1):  # the truncated sample differs between the two, everything else is the same
        data = experience()
        data.rollouts.finish[3] = FinishReason.LENGTH
        data.rollouts.completion_ids[3] = [seed] * 30
        algorithm.prepare(data)
        update = PolicyUpdate(algorithm, 100, 1e9)
        results += [gradients(policy) for _ in update.steps(policy, data, 0, lambda part: part.backward())]
        policy.zero_grad()
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-5, atol=1e-7)


def test_a_non_finite_loss_is_told_and_named() -> None:
    data, policy, algorithm = experience(), model(), GRPO(kl_coef=0.0)
    algorithm.prepare(data)
    assert data.advantages is not None
    data.advantages[0] = float("nan")
    update = PolicyUpdate(algorithm, 100, 1.0)
    (step,) = update.steps(policy, data, 0, lambda part: part.backward())
    assert step.problem == "the policy's loss is nan"
    assert update.metrics()["policy/skipped"] == 1.0
