"""PPO's advantages, returns and losses equal slow loops over tokens."""

import math
from typing import Any

import pytest
import torch

from rlmt.algorithms import GRPO, PPO
from rlmt.errors import UserError
from rlmt.types import (
    Experience,
    FinishReason,
    PolicyOutputs,
    Prompt,
    RolloutBatch,
    Sampling,
    Scores,
    TokenBatch,
)

LENGTHS = [4, 1, 6]


def experience(seed: int = 0) -> Experience:
    """Three samples of three prompts, the last of them truncated."""
    make = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    rollouts = RolloutBatch(
        prompts=[Prompt(i, [{"role": "user", "content": "?"}]) for i in range(3)],
        group_size=1,
        prompt_ids=[[1]] * 3,
        completion_ids=[[2] * n for n in LENGTHS],
        engine_logprobs=torch.zeros(total),
        finish=[FinishReason.STOP, FinishReason.STOP, FinishReason.LENGTH],
        sampling=Sampling(1.0, 6),
        weight_version=0,
    )
    return Experience(
        rollouts=rollouts,
        texts=[],
        splits=[],
        thought_tokens=torch.zeros(3, dtype=torch.long),
        scores=Scores(torch.tensor([2.0, -1.0, 0.5]), {}, []),
        group=torch.arange(3),
        lengths=torch.tensor(LENGTHS),
        engine_logprobs=rollouts.engine_logprobs,
        old_logprobs=torch.randn(total, generator=make) - 2,
        ref_logprobs=torch.randn(total, generator=make) - 2,
        values=torch.randn(total, generator=make),
    )


def slow(data: Experience, gamma: float, lam: float, kl_coef: float) -> tuple[list[float], list[float]]:
    """Advantages before whitening, and returns, with each token's k1 subtracted from its reward."""
    assert data.values is not None and data.old_logprobs is not None and data.ref_logprobs is not None
    advantages, returns, end = [], [], 0
    for sample, length in enumerate(LENGTHS):
        end += length
        running, following, backwards = 0.0, 0.0, []
        for t in reversed(range(end - length, end)):
            reward = -kl_coef * (data.old_logprobs[t].item() - data.ref_logprobs[t].item())
            reward += data.scores.total[sample].item() if t == end - 1 else 0.0
            value = data.values[t].item()
            running = reward + gamma * following - value + gamma * lam * running
            following = value
            backwards.append((running, running + value))
        advantages += [a for a, _ in reversed(backwards)]
        returns += [r for _, r in reversed(backwards)]
    return advantages, returns


@pytest.mark.parametrize("placement", ["loss", "reward"])
@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("whiten", [False, True])
def test_ppo_prepare_equals_a_loop_over_tokens(placement: Any, mask_truncated: bool, whiten: bool) -> None:
    data = experience()
    options: dict[str, Any] = {"kl_coef": 0.3, "kl_placement": placement, "mask_truncated": mask_truncated}
    PPO(gamma=0.9, lam=0.8, whiten_advantages=whiten, **options).prepare(data)
    advantages, returns = slow(data, 0.9, 0.8, 0.3 if placement == "reward" else 0.0)
    assert data.returns is not None and data.advantages is not None and data.values is not None
    torch.testing.assert_close(data.returns, torch.tensor(returns), rtol=1e-5, atol=1e-6)
    counted = slice(0, 5) if mask_truncated else slice(0, 11)  # the truncated sample is the last one
    assert (data.mask is None) == (not mask_truncated)
    expected = torch.tensor(advantages, dtype=torch.float64)
    if whiten:
        inside = expected[counted]
        spread = (((inside - inside.mean()) ** 2).sum() / (len(inside) - 1)).sqrt()
        expected = (expected - inside.mean()) / (spread + 1e-6)
    torch.testing.assert_close(data.advantages[counted], expected[counted].float(), rtol=1e-5, atol=1e-6)
    target, error = torch.tensor(returns)[counted], torch.tensor(returns)[counted] - data.values[counted]
    known = 1 - (error - error.mean()).square().sum() / (target - target.mean()).square().sum()
    assert data.metrics == {"critic/explained_variance": pytest.approx(known.item(), rel=1e-4)}


def test_kl_penalty_is_in_the_loss_or_in_the_reward() -> None:
    """A penalty in the reward is not in the loss, but its size is still logged."""
    gradients = []
    for options in ({"kl_coef": 0.0}, {"kl_placement": "reward"}, {"kl_placement": "loss"}):
        algorithm = PPO(**{"kl_coef": 0.3, "entropy_coef": 0.0} | options)  # type: ignore[arg-type]
        logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
        tokens = TokenBatch(
            sample=torch.zeros(3, dtype=torch.long),
            lengths=torch.tensor([3]),
            advantages=torch.zeros(3),
            old_logprobs=None,
            ref_logprobs=torch.tensor([-1.5, -1.0, -0.5]),
            engine_logprobs=torch.zeros(3),
            weights=torch.full((3,), 1 / 3),
        )
        loss, metrics = algorithm.loss(tokens, PolicyOutputs(logprobs, torch.zeros(3)))
        loss.backward()
        assert metrics["policy/kl"].tolist() == pytest.approx([math.exp(-0.5) - 0.5, math.exp(1.0) - 2, 0.0])
        assert logprobs.grad is not None
        gradients.append(logprobs.grad.tolist())
    assert gradients[0] == gradients[1] == [0.0, 0.0, 0.0]
    # d k3 / d log-prob = 1 - exp(-d)
    expected = [0.1 * (1 - math.exp(-0.5)), 0.1 * (1 - math.exp(1.0)), 0.0]
    assert gradients[2] == pytest.approx(expected, rel=1e-5)


def test_kl_placements_need_reference_and_old_logprobs() -> None:
    assert (PPO(kl_coef=0.0).needs_reference, PPO(kl_coef=0.0).needs_old_logprobs) == (False, False)
    assert (PPO().needs_reference, PPO().needs_old_logprobs) == (True, False)
    inside = PPO(kl_placement="reward")
    assert (inside.needs_reference, inside.needs_old_logprobs) == (True, True)
    assert not PPO(kl_placement="reward", kl_coef=0.0).needs_old_logprobs
    assert PPO(target_kl=6.0).needs_old_logprobs


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_step_uses_the_kl_coefficient_of_earlier_steps(placement: Any) -> None:
    algorithm = PPO(kl_coef=0.5, kl_placement=placement, target_kl=4.0, kl_horizon=30)
    coefs = []
    for seed in range(3):
        data = experience(seed)
        assert data.old_logprobs is not None and data.ref_logprobs is not None
        kl = (data.old_logprobs - data.ref_logprobs).sum().item() / 3
        algorithm.prepare(data)
        coefs.append(data.metrics["policy/kl_coef"])
        assert data.metrics["policy/completion_kl"] == pytest.approx(kl, rel=1e-5)
        assert algorithm.kl_loss_coef == (coefs[-1] if placement == "loss" else 0.0)
        _, returns = slow(data, 1.0, 1.0, coefs[-1] if placement == "reward" else 0.0)
        torch.testing.assert_close(data.returns, torch.tensor(returns), rtol=1e-5, atol=1e-6)
        following = coefs[-1] * (1 + max(-0.2, min(0.2, kl / 4.0 - 1)) * 3 / 30)
        assert algorithm.state_dict() == {"kl_coef": pytest.approx(following, rel=1e-6)}
    assert coefs[0] == 0.5 and len(set(coefs)) == 3

    resumed = PPO(kl_coef=0.5, kl_placement=placement, target_kl=4.0, kl_horizon=30)
    resumed.load_state_dict(algorithm.state_dict())
    data = experience(7)
    resumed.prepare(data)
    assert data.metrics["policy/kl_coef"] == algorithm.state_dict()["kl_coef"]


def test_kl_coefficient_without_target_is_the_option() -> None:
    algorithm = PPO(kl_coef=0.5)
    assert algorithm.state_dict() == {}
    algorithm.load_state_dict({"kl_coef": 9.0})
    assert algorithm.kl_loss_coef == 0.5


@pytest.mark.parametrize("value_clip", [None, 0.5, 0.1])
def test_value_loss_equals_a_sum_over_tokens(value_clip: float | None) -> None:
    make = torch.Generator().manual_seed(3)
    old, returns, weights = (torch.randn(40, generator=make) for _ in range(3))
    values = (old + 0.6 * torch.randn(40, generator=make)).requires_grad_()
    tokens = TokenBatch(
        sample=torch.zeros(40, dtype=torch.long),
        lengths=torch.tensor([40]),
        advantages=None,
        old_logprobs=None,
        ref_logprobs=None,
        engine_logprobs=torch.zeros(40),
        weights=weights,
        values=old,
        returns=returns,
    )
    loss, metrics = PPO(value_clip=value_clip).value_loss(tokens, values)
    loss.backward()
    expected, held, slopes = 0.0, [], []
    for v, o, r, w in zip(values.tolist(), old.tolist(), returns.tolist(), weights.tolist(), strict=True):
        near = v if value_clip is None or abs(v - o) <= value_clip else o + math.copysign(value_clip, v - o)
        expected += w * 0.5 * max((v - r) ** 2, (near - r) ** 2)
        held.append(float((near - r) ** 2 > (v - r) ** 2))
        slopes.append(0.0 if held[-1] else w * (v - r))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["critic/clip_frac"].tolist() == held
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor(slopes))
    assert (0 < sum(held) < 40) == (value_clip is not None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gamma": 1.1}, "gamma"),
        ({"lam": -0.1}, "lam"),
        ({"target_kl": 0.0}, "target_kl"),
        ({"target_kl": 6.0, "kl_coef": 0.0}, "kl_coef"),
        ({"kl_horizon": 0}, "kl_horizon"),
        ({"value_clip": 0.0}, "value_clip"),
        ({"critic_lr": 0.0}, "critic_lr"),
        ({"critic_warmup_steps": -1}, "critic_warmup_steps"),
        ({"critic_shared": True, "critic_init": "some/reward"}, "critic_shared"),
        ({"clip_low": 1.0}, "clip_low"),
    ],
)
def test_options_out_of_range_raise_with_their_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"(PPO|--model.algorithm).*{named}"):
        PPO(**options)


def test_ppo_accepts_a_group_of_one() -> None:
    with pytest.raises(UserError, match="group_size is 1"):
        GRPO().check(1)
    PPO().check(1)
    PPO().check(8)
