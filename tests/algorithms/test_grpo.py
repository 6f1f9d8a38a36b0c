"""GRPO's loss equals a slow sum over tokens."""

import math
from typing import Any

import pytest
import torch

from rlmt.algorithms import GRPO
from rlmt.errors import UserError
from rlmt.types import PolicyOutputs, TokenBatch


def batch(seed: int = 0) -> tuple[TokenBatch, PolicyOutputs]:
    make = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([2, 4, 3])
    total = int(lengths.sum())

    def draw(scale: float = 0.4) -> torch.Tensor:
        return torch.randn(total, generator=make) * scale

    logprobs = (draw() - 1.5).requires_grad_()
    tokens = TokenBatch(
        sample=torch.arange(3).repeat_interleave(lengths),
        lengths=lengths,
        advantages=torch.tensor([1.5, -0.7, -2.0]).repeat_interleave(lengths),
        old_logprobs=logprobs.detach() + draw(),
        ref_logprobs=logprobs.detach() + draw(),
        engine_logprobs=logprobs.detach() + draw(),
        weights=torch.rand(total, generator=make),
    )
    return tokens, PolicyOutputs(logprobs, draw().abs().requires_grad_())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_low": 0.1, "clip_high": 0.5, "dual_clip": None},
        {"dual_clip": 1.1},
        {"kl_coef": 0.5, "kl_estimator": "k1", "entropy_coef": 0.3},
        {"kl_coef": 0.5, "kl_estimator": "k2"},
        {"importance_cap": 1.2},
    ],
)
def test_grpo_loss_equals_a_sum_over_tokens(options: dict[str, Any]) -> None:
    tokens, outputs = batch()
    o: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "kl_coef": 0.001, "kl_estimator": "k3"}
    o |= {"entropy_coef": 0.001, "importance_cap": None} | options
    assert tokens.old_logprobs is not None and tokens.ref_logprobs is not None
    expected = 0.0
    for t in range(len(tokens.advantages)):
        lp, old = outputs.logprobs[t].item(), tokens.old_logprobs[t].item()
        ref, engine, a = tokens.ref_logprobs[t].item(), tokens.engine_logprobs[t].item(), tokens.advantages[t].item()
        r = math.exp(lp - old)
        clipped = max(1 - o["clip_low"], min(1 + o["clip_high"], r))
        objective = min(r * a, clipped * a)
        if o["dual_clip"] and a < 0:
            objective = max(objective, o["dual_clip"] * a)
        if o["importance_cap"]:
            objective *= min(math.exp(old - engine), o["importance_cap"])
        d = lp - ref
        kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[o["kl_estimator"]]
        token = -objective + o["kl_coef"] * kl - o["entropy_coef"] * outputs.entropy[t].item()
        expected += tokens.weights[t].item() * token
    loss, metrics = GRPO(**options).loss(tokens, outputs)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert all(value.shape == tokens.advantages.shape and not value.requires_grad for value in metrics.values())


def test_first_update_has_ratio_exactly_one_and_the_plain_policy_gradient() -> None:
    tokens, outputs = batch()
    tokens.old_logprobs = None
    loss, metrics = GRPO(kl_coef=0.0, entropy_coef=0.0).loss(tokens, outputs)
    assert metrics["policy/ratio_max"].tolist() == [1.0] * 9
    assert metrics["policy/approx_kl"].tolist() == [0.0] * 9
    (gradient,) = torch.autograd.grad(loss, outputs.logprobs)
    torch.testing.assert_close(gradient, -tokens.advantages * tokens.weights)


def test_clip_metrics_count_clipped_tokens() -> None:
    tokens, outputs = batch()
    tokens.advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0, -1.0, 1.0])
    ratios = torch.tensor([1.5, 1.1, 0.5, 0.5, 0.9, 1.5, 1.3, 0.7, 1.0])
    tokens.old_logprobs = outputs.logprobs.detach() - ratios.log()
    _, metrics = GRPO().loss(tokens, outputs)
    assert metrics["policy/clip_high"].tolist() == [1, 0, 0, 0, 0, 0, 1, 0, 0]
    assert metrics["policy/clip_low"].tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"clip_low": 1.0}, "clip_low"),
        ({"dual_clip": 0.5}, "dual_clip"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"minibatches": 0}, "minibatches"),
        ({"update_epochs": 0}, "update_epochs"),
        ({"importance_cap": 0.0}, "importance_cap"),
    ],
)
def test_options_out_of_range_raise_with_their_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        GRPO(**options)


@pytest.mark.parametrize("normalize", [True, False])
def test_group_of_one_raises(normalize: bool) -> None:
    with pytest.raises(UserError, match="group_size is 1"):
        GRPO(normalize_std=normalize).check(1)
    GRPO(normalize_std=normalize).check(2)


def test_reference_is_needed_only_for_the_kl_penalty() -> None:
    assert GRPO().needs_reference
    assert not GRPO(kl_coef=0.0).needs_reference
