"""Each named variant equals its paper's formula: slow sums over tokens, and numbers calculated by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlmt.algorithms import DAPO, GRPO, GSPO, RLOO, DrGRPO, PolicyGradient, REINFORCEPlusPlus
from rlmt.algorithms.advantages import (
    leave_one_out_advantages,
    overlong_penalty,
    sum_before,
    sum_by_sample,
)
from rlmt.errors import UserError
from rlmt.types import Experience, FinishReason, PolicyOutputs, Prompt, RolloutBatch, Sampling, Scores, TokenBatch

LENGTHS = [2, 4, 3, 1]
LIMIT = 10


def experience(rewards: list[float], group_size: int = 2, seed: int = 0) -> Experience:
    """Two prompts with two samples each, random log-probs of the policy and the reference."""
    make = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    prompts = len(LENGTHS) // group_size
    rollouts = RolloutBatch(
        prompts=[Prompt(i, [{"role": "user", "content": "?"}]) for i in range(prompts)],
        group_size=group_size,
        prompt_ids=[[1]] * prompts,
        completion_ids=[[0] * n for n in LENGTHS],
        engine_logprobs=torch.zeros(total),
        finish=[FinishReason.STOP] * len(LENGTHS),
        sampling=Sampling(1.0, LIMIT),
        weight_version=0,
    )
    return Experience(
        rollouts=rollouts,
        texts=[],
        splits=[],
        thought_tokens=torch.zeros(len(LENGTHS), dtype=torch.long),
        scores=Scores(torch.tensor(rewards), {}, []),
        group=torch.arange(prompts).repeat_interleave(group_size),
        lengths=torch.tensor(LENGTHS),
        engine_logprobs=rollouts.engine_logprobs,
        old_logprobs=torch.randn(total, generator=make) - 2,
        ref_logprobs=torch.randn(total, generator=make) - 2,
    )


def prepared(algorithm: PolicyGradient, data: Experience, seed: int = 1) -> tuple[TokenBatch, PolicyOutputs]:
    """One micro-batch with the whole step, and a policy that was updated after sampling."""
    algorithm.prepare(data)
    assert data.advantages is not None and data.old_logprobs is not None
    advantages = data.advantages
    if len(advantages) == len(LENGTHS):
        advantages = advantages.repeat_interleave(data.lengths)
    move = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(seed)) * 0.3
    tokens = TokenBatch(
        sample=torch.arange(len(LENGTHS)).repeat_interleave(data.lengths),
        lengths=data.lengths,
        advantages=advantages,
        old_logprobs=data.old_logprobs,
        ref_logprobs=data.ref_logprobs if algorithm.needs_reference else None,
        engine_logprobs=data.engine_logprobs,
        weights=algorithm.token_weights(data.lengths, torch.ones(len(LENGTHS), dtype=torch.bool), LIMIT),
    )
    logprobs = (data.old_logprobs + move).requires_grad_()
    return tokens, PolicyOutputs(logprobs, torch.ones(sum(LENGTHS)))


def by_sample(values: Tensor) -> list[list[float]]:
    return [part.tolist() for part in values.split(LENGTHS)]


# ---------------------------------------------------------------------------------------------------------- the pieces


def test_leave_one_out_equals_a_calculation_by_hand() -> None:
    rewards, group = torch.tensor([1.0, 2.0, 6.0, 5.0, 3.0]), torch.tensor([0, 0, 0, 1, 1])
    # others' means: 4, 3.5, 1.5; 3, 5
    assert leave_one_out_advantages(rewards, group).tolist() == [-3.0, -1.5, 4.5, 2.0, -2.0]
    assert leave_one_out_advantages(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.long)).tolist() == [0.0] * 3


def test_overlong_penalty_equals_the_formula_of_the_paper() -> None:
    # eq. 13 with the paper's numbers: at most 20,480 tokens, of which the last 4,096 are the buffer
    lengths = torch.tensor([1, 16_384, 17_408, 18_432, 20_480])
    assert overlong_penalty(lengths, 20_480, 0.2).tolist() == pytest.approx([0, 0, -0.25, -0.5, -1])


def test_sums_over_the_tokens_of_each_sample() -> None:
    values, lengths = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([3, 1, 1])
    assert sum_by_sample(values, lengths).tolist() == [6.0, 4.0, 5.0]
    assert sum_before(values, lengths).tolist() == [0.0, 1.0, 3.0, 0.0, 0.0]


# ------------------------------------------------------------------------------------------------- the named objectives


def test_rloo_equals_reinforce_on_the_penalized_reward() -> None:
    """(1/n) Σ_i (R_i - mean of the others' R) ∇ log π(y_i), with R = r - β log(π/π_ref) summed over y."""
    data, beta = experience([1.0, -0.5, 2.0, 0.25]), 0.3
    tokens, _ = prepared(algorithm := RLOO(reward_kl_coef=beta), data)
    assert data.old_logprobs is not None and data.ref_logprobs is not None
    kl = [sum(row) for row in by_sample(data.old_logprobs - data.ref_logprobs)]
    r = [reward - beta * k for reward, k in zip([1.0, -0.5, 2.0, 0.25], kl, strict=True)]
    expected = [r[0] - r[1], r[1] - r[0], r[2] - r[3], r[3] - r[2]]
    assert data.advantages is not None and data.advantages.tolist() == pytest.approx(expected, rel=1e-5)
    # for the policy that generated the samples, the gradient by each log-prob is -A/n, up to the constant length limit
    logprobs = data.old_logprobs.clone().requires_grad_()
    loss, metrics = algorithm.loss(tokens, PolicyOutputs(logprobs, torch.ones_like(logprobs)))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    slow = [-a / 4 / LIMIT for a, n in zip(expected, LENGTHS, strict=True) for _ in range(n)]
    assert gradient.tolist() == pytest.approx(slow, rel=1e-5)
    assert "policy/kl" in metrics  # still logged, though not part of the loss


def test_reinforce_plus_plus_whitens_rewards_to_go() -> None:
    """A_t = r - β Σ_{i ≥ t} log(π_old/π_ref)_i, whitened over all tokens of the batch."""
    rewards, beta = [1.0, -0.5, 2.0, 0.25], 0.3
    data = experience(rewards)
    REINFORCEPlusPlus(reward_kl_coef=beta).prepare(data)
    assert data.old_logprobs is not None and data.ref_logprobs is not None and data.advantages is not None
    to_go = [
        reward - beta * sum(row[t:])
        for reward, row in zip(rewards, by_sample(data.old_logprobs - data.ref_logprobs), strict=True)
        for t in range(len(row))
    ]
    mean = sum(to_go) / len(to_go)
    std = math.sqrt(sum((a - mean) ** 2 for a in to_go) / (len(to_go) - 1))
    assert data.advantages.tolist() == pytest.approx([(a - mean) / std for a in to_go], rel=1e-4)


@pytest.mark.parametrize("truncated", [0, 2])
def test_reinforce_plus_plus_whitens_over_the_samples_in_the_loss(truncated: int) -> None:
    rewards = [1.0, -0.5, 2.0, 0.25]
    rewards[truncated] = 100.0  # would otherwise dominate mean and deviation
    data = experience(rewards)
    data.rollouts.finish[truncated] = FinishReason.LENGTH
    REINFORCEPlusPlus(reward_kl_coef=0.0, mask_truncated=True).prepare(data)
    to_go = [rewards[i] for i, n in enumerate(LENGTHS) if i != truncated for _ in range(n)]
    mean = sum(to_go) / len(to_go)
    std = math.sqrt(sum((a - mean) ** 2 for a in to_go) / (len(to_go) - 1))
    assert data.advantages is not None
    got = [row for i, row in enumerate(by_sample(data.advantages)) if i != truncated]
    assert [a for row in got for a in row] == pytest.approx([(a - mean) / std for a in to_go], rel=1e-4)


def test_reinforce_plus_plus_without_kl_needs_no_reference_and_no_groups() -> None:
    algorithm = REINFORCEPlusPlus(reward_kl_coef=0.0)
    assert not algorithm.needs_reference and not algorithm.needs_old_logprobs
    data = experience([1.0, 0.0, 0.0, 0.0], group_size=1)
    algorithm.check(1)
    algorithm.prepare(data)
    # 2 of 10 tokens have reward 1: mean .2, variance 1.6 / 9
    assert data.advantages is not None
    assert data.advantages.tolist() == pytest.approx([0.8 * 3 / 1.6**0.5] * 2 + [-0.2 * 3 / 1.6**0.5] * 8, rel=1e-4)


def gspo_objective(logprobs: Tensor, old: Tensor, advantages: list[float], low: float, high: float) -> Tensor:
    """Eq. 5 and 7: the mean over sequences of min(s·A, clip(s)·A), with s = (π/π_old)^(1/|y|), by sequence."""
    terms = []
    for new, before, a in zip(logprobs.split(LENGTHS), old.split(LENGTHS), advantages, strict=True):
        s = (new.sum().exp() / before.sum().exp()) ** (1 / len(new))
        terms.append(torch.min(s * a, s.clamp(1 - low, 1 + high) * a))
    return torch.stack(terms).mean()


@pytest.mark.parametrize(("low", "high", "moving"), [(3e-4, 4e-4, 7), (0.9, 9.0, 10)], ids=["paper", "unclipped"])
def test_gspo_ratio_loss_and_gradient_are_per_sequence(low: float, high: float, moving: int) -> None:
    """With the paper's ranges, sequences 1 and 2 have a gradient, and all tokens of 0 and 3 are clipped."""
    data = experience([1.0, -0.5, 2.0, 0.25])
    algorithm = GSPO(sequence_clip_low=low, sequence_clip_high=high, kl_coef=0.0)
    tokens, outputs = prepared(algorithm, data)
    assert data.advantages is not None and data.old_logprobs is not None
    # two samples: (r - mean) / (unbiased deviation) is ± 1/√2
    assert data.advantages.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5), 0.5**0.5, -(0.5**0.5)], rel=1e-5)
    expected = -gspo_objective(outputs.logprobs, data.old_logprobs, data.advantages.tolist(), low, high)
    (slope,) = torch.autograd.grad(expected, outputs.logprobs)
    loss, metrics = algorithm.loss(tokens, outputs)
    (gradient,) = torch.autograd.grad(loss, outputs.logprobs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-7)
    for ratios, new, old in zip(
        by_sample(metrics["policy/ratio_max"]),
        by_sample(outputs.logprobs),
        by_sample(data.old_logprobs),
        strict=True,
    ):
        s = math.exp((sum(new) - sum(old)) / len(new))
        assert ratios == pytest.approx([s] * len(new), rel=1e-5)
    assert int((slope != 0).sum()) == moving


def test_gspo_first_update_has_ratio_exactly_one() -> None:
    tokens, outputs = prepared(algorithm := GSPO(kl_coef=0.0), experience([1.0, -0.5, 2.0, 0.25]))
    tokens.old_logprobs = None
    loss, metrics = algorithm.loss(tokens, outputs)
    assert metrics["policy/ratio_max"].tolist() == [1.0] * sum(LENGTHS)
    (gradient,) = torch.autograd.grad(loss, outputs.logprobs)
    assert tokens.advantages is not None
    torch.testing.assert_close(gradient, -tokens.advantages * tokens.weights)


def test_dr_grpo_divides_by_neither_deviation_nor_length() -> None:
    data = experience([1.0, -0.5, 2.0, 0.25])
    tokens, outputs = prepared(algorithm := DrGRPO(), data)
    assert data.old_logprobs is not None
    advantages = [0.75, -0.75, 0.875, -0.875]  # r - mean: means .25 and 1.125
    slow = 0.0
    for new, old, a in zip(by_sample(outputs.logprobs), by_sample(data.old_logprobs), advantages, strict=True):
        for lp, before in zip(new, old, strict=True):
            r = math.exp(lp - before)
            slow -= min(r * a, max(0.8, min(1.2, r)) * a) / LIMIT / 4
    assert algorithm.loss(tokens, outputs)[0].item() == pytest.approx(slow, rel=1e-5)
    assert not algorithm.needs_reference


def test_dapo_loss_is_a_token_mean_with_a_higher_clip_on_shaped_rewards() -> None:
    """With eq. 13 at a limit of 10 tokens whose last 8 are the buffer: lengths 4 and 3 lose 2/8 and 1/8."""
    data = experience([1.0, -0.5, 2.0, 0.25])
    tokens, outputs = prepared(algorithm := DAPO(overlong_penalty=2.0, overlong_buffer=0.8), data)
    assert data.old_logprobs is not None
    shaped = [1.0, -0.5 - 2 * 0.25, 2.0 - 2 * 0.125, 0.25]
    slow = 0.0
    for i, (new, old) in enumerate(zip(by_sample(outputs.logprobs), by_sample(data.old_logprobs), strict=True)):
        pair = shaped[i // 2 * 2 : i // 2 * 2 + 2]
        mean = sum(pair) / 2
        std = math.sqrt(sum((r - mean) ** 2 for r in pair))
        a = (shaped[i] - mean) / (std + 1e-6)
        for lp, before in zip(new, old, strict=True):
            r = math.exp(lp - before)
            slow -= min(r * a, max(0.8, min(1.28, r)) * a) / sum(LENGTHS)
    assert algorithm.loss(tokens, outputs)[0].item() == pytest.approx(slow, rel=1e-5)
    assert data.scores.total.tolist() == [1.0, -0.5, 2.0, 0.25]  # reward metrics are of unshaped scores
    assert data.metrics["reward/overlong_penalty"] == pytest.approx(-2 * (0.25 + 0.125) / 4)
    assert (algorithm.dynamic_sampling, algorithm.needs_reference) == (4, False)


def test_penalties_change_the_sign_of_an_advantage() -> None:
    """Of two equal answers the longer one has the lower advantage with the penalty; also with KL in the reward."""
    data = experience([1.0, 1.0, 1.0, 1.0])
    GRPO(normalize_std=False).prepare(data)
    assert data.advantages is not None and data.advantages.tolist() == [0.0] * 4 and data.metrics == {}
    GRPO(normalize_std=False, overlong_penalty=1.0, overlong_buffer=0.8).prepare(data)
    assert data.advantages.tolist() == pytest.approx([0.125, -0.125, -0.0625, 0.0625])
    assert data.ref_logprobs is not None
    data.old_logprobs = data.ref_logprobs + 1  # each token costs β
    GRPO(normalize_std=False, reward_kl_coef=0.5).prepare(data)
    assert data.advantages.tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5], abs=1e-5)


@pytest.mark.parametrize("variant", [DrGRPO, DAPO, GSPO, RLOO, REINFORCEPlusPlus])
def test_truncated_samples_can_be_masked(variant: Any) -> None:
    data = experience([1.0, -0.5, 2.0, 0.25])
    data.rollouts.finish[2] = FinishReason.LENGTH
    variant(mask_truncated=True).prepare(data)
    assert data.mask is not None and data.mask.tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("variant", "options", "named"),
    [
        (GSPO, {"sequence_clip_low": 1.5}, "sequence_clip_low"),
        (GSPO, {"sequence_clip_high": 0.0}, "sequence_clip_high"),
        (RLOO, {"reward_kl_coef": -1.0}, "reward_kl_coef"),
        (DAPO, {"overlong_buffer": 0.0}, "overlong_buffer"),
        (DAPO, {"overlong_buffer": 4096.0}, "overlong_buffer"),
        (DAPO, {"overlong_penalty": -1.0}, "overlong_penalty"),
        (GRPO, {"dynamic_sampling": -1}, "dynamic_sampling"),
    ],
)
def test_options_out_of_range_raise_with_their_name(variant: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=rf"^{variant.__name__}\.{named} is "):
        variant(**options)


@pytest.mark.parametrize("variant", [DrGRPO, DAPO, GSPO, RLOO])
def test_groups_of_one_raise(variant: Any) -> None:
    with pytest.raises(UserError, match=f"group_size is 1: {variant.__name__} compares"):
        variant().check(1)
    with pytest.raises(UserError, match="group_size is 1"):
        REINFORCEPlusPlus(dynamic_sampling=1).check(1)


@pytest.mark.parametrize("variant", [RLOO, REINFORCEPlusPlus])
def test_kl_in_the_reward_needs_reference_and_old_logprobs(variant: Any) -> None:
    assert variant().needs_reference and variant().needs_old_logprobs
    assert not variant(reward_kl_coef=0.0).needs_reference and not variant(reward_kl_coef=0.0).needs_old_logprobs
