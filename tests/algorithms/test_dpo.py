"""DPO: losses and gradients equal numbers calculated by hand, and pairs of a rollout batch."""

import math
from typing import Any

import pytest
import torch

from rlmt.algorithms import DPO
from rlmt.algorithms.dpo import PAIR_METRICS
from rlmt.errors import UserError
from rlmt.types import (
    Experience,
    FinishReason,
    PolicyOutputs,
    Prompt,
    RolloutBatch,
    Sampling,
    Scores,
    Split,
    Status,
    TokenBatch,
)

LOG3 = math.log(3)


def batch(ratios: list[list[float]], pairs_in_step: int) -> tuple[TokenBatch, PolicyOutputs]:
    """Samples whose tokens have these log-ratios to the reference; the policy's log-probs are -1."""
    lengths = torch.tensor([len(tokens) for tokens in ratios])
    flat = torch.tensor([ratio for tokens in ratios for ratio in tokens])
    logprobs = torch.full_like(flat, -1.0).requires_grad_()
    tokens = TokenBatch(
        sample=torch.arange(len(ratios)).repeat_interleave(lengths),
        lengths=lengths,
        advantages=None,
        old_logprobs=None,
        ref_logprobs=logprobs.detach() - flat,
        engine_logprobs=torch.zeros_like(flat),
        weights=torch.full_like(flat, 1 / pairs_in_step),
    )
    return tokens, PolicyOutputs(logprobs, torch.full_like(flat, 2.0))


# Δ_chosen = 0.5 · log 3 over two tokens, Δ_rejected = -1.5 · log 3 over one: they differ by 2 · log 3.
PAIR = [[LOG3, -0.5 * LOG3], [-1.5 * LOG3]]
GAP = 2 * LOG3
MEAN_GAP = 7 / 4 * LOG3


@pytest.mark.parametrize(
    ("options", "loss", "chosen", "rejected"),
    [
        # beta · gap = log 3, so σ = 3/4: the loss is log(4/3), and its gradient -beta σ(-log 3) = -beta / 4
        ({"beta": 0.5}, math.log(4 / 3), -0.125, 0.125),
        # the minimum of the loss is at a gap of 1 / (2 beta) = 2
        ({"beta": 0.25, "loss": "ipo_sum"}, (GAP - 2) ** 2, 2 * (GAP - 2), -2 * (GAP - 2)),
        # by token: a gap of 7/4 log 3, and gradients divided by 2 tokens and 1 token
        ({"beta": 0.25, "loss": "ipo"}, (MEAN_GAP - 2) ** 2, MEAN_GAP - 2, -2 * (MEAN_GAP - 2)),
        # Δ by token are log 3 / 4 and -1.5 log 3, which differ by 7/4 log 3; with beta 4/7 σ is 3/4 again
        ({"beta": 4 / 7, "loss": "length_normalized"}, math.log(4 / 3), -1 / 14, 1 / 7),
    ],
)
def test_dpo_loss_and_gradient_of_a_pair_equal_the_formulas(
    options: dict[str, Any], loss: float, chosen: float, rejected: float
) -> None:
    tokens, outputs = batch(PAIR, pairs_in_step=1)
    got, _ = DPO(**options).loss(tokens, outputs)
    assert got.item() == pytest.approx(loss, rel=1e-5)
    (gradient,) = torch.autograd.grad(got, outputs.logprobs)
    # every token of a completion has the same weight, in thought and response
    torch.testing.assert_close(gradient, torch.tensor([chosen, chosen, rejected]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "ipo_sum", "length_normalized"])
def test_dpo_loss_is_the_mean_over_the_pairs_of_the_step(kind: Any) -> None:
    make = torch.Generator().manual_seed(0)
    ratios = [torch.randn(length, generator=make).tolist() for length in (3, 1, 7, 4, 2, 2)]
    beta = 0.3
    losses = []
    for chosen, rejected in zip(ratios[::2], ratios[1::2], strict=True):
        if kind in ("ipo", "length_normalized"):
            margin = beta * (sum(chosen) / len(chosen) - sum(rejected) / len(rejected))
        else:
            margin = beta * (sum(chosen) - sum(rejected))
        ipo = kind.startswith("ipo")
        losses.append((margin / beta - 1 / (2 * beta)) ** 2 if ipo else math.log(1 + math.exp(-margin)))
    dpo = DPO(beta=beta, loss=kind)
    whole, _ = dpo.loss(*batch(ratios, pairs_in_step=3))
    parts = [dpo.loss(*batch(ratios[k : k + 2], pairs_in_step=3))[0].item() for k in (0, 2, 4)]
    assert whole.item() == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert sum(parts) == pytest.approx(whole.item(), rel=1e-5)


def test_dpo_loss_of_an_extreme_margin_is_finite() -> None:
    for sign in (1, -1):
        tokens, outputs = batch([[sign * 5000.0], [-sign * 5000.0]], pairs_in_step=1)
        loss, _ = DPO().loss(tokens, outputs)
        assert loss.item() == pytest.approx(0.0 if sign == 1 else 1000.0)
        (gradient,) = torch.autograd.grad(loss, outputs.logprobs)
        torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0] if sign == 1 else [-0.1, 0.1]))


def test_metrics() -> None:
    ratios = [*PAIR, [0.2], [0.5, 0.1], [0.7], [0.7]]
    _, metrics = DPO(beta=0.5).loss(*batch(ratios, pairs_in_step=3))
    assert set(metrics) == set(PAIR_METRICS)
    expected = {
        "dpo/accuracy": [1.0, 0.0, 0.5],  # equal rewards count as half
        "dpo/margin": [LOG3, -0.2, 0.0],
        "dpo/chosen_reward": [LOG3 / 4, 0.1, 0.35],
        "dpo/rejected_reward": [-0.75 * LOG3, 0.3, 0.35],
        "dpo/chosen_logprobs": [-2.0, -1.0, -1.0],  # sums over a sequence
        "dpo/rejected_logprobs": [-1.0, -2.0, -1.0],
        "policy/entropy": [2.0] * 8,
    }
    for name, values in expected.items():
        torch.testing.assert_close(metrics[name], torch.tensor(values), msg=name)
        assert not metrics[name].requires_grad


def test_implicit_rewards_match_the_pair_loss() -> None:
    _, metrics = DPO(beta=4 / 7, loss="length_normalized").loss(*batch(PAIR, pairs_in_step=1))
    assert metrics["dpo/margin"].item() == pytest.approx(LOG3, rel=1e-5)


def test_dpo_token_weights_are_those_of_pairs() -> None:
    lengths, mask = torch.tensor([2, 1, 3, 1, 2]), torch.tensor([True, False, True, True, True])
    weights = DPO().token_weights(lengths, mask, 100)
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]))
    assert DPO().token_weights(lengths, torch.zeros(5, dtype=torch.bool), 100).tolist() == [0.0] * 9


def experience(rewards: list[float], ok: list[bool], truncated: tuple[int, ...] = ()) -> Experience:
    """Two prompts of 3 and 5 tokens; sample i has i + 1 tokens."""
    size = len(rewards)
    status = {True: Status.OK, False: Status.UNCLOSED}
    rollouts = RolloutBatch(
        prompts=[Prompt(index, [{"role": "user", "content": "?"}]) for index in (11, 4)],
        group_size=size // 2,
        prompt_ids=[[1] * 3, [2] * 5],
        completion_ids=[[i] * (i + 1) for i in range(size)],
        engine_logprobs=torch.zeros(size * (size + 1) // 2),
        finish=[FinishReason.LENGTH if i in truncated else FinishReason.STOP for i in range(size)],
        sampling=Sampling(0.7, 10),
        weight_version=0,
    )
    return Experience(
        rollouts=rollouts,
        texts=[""] * size,
        splits=[Split("", "x" if good else "", status[good]) for good in ok],
        thought_tokens=torch.ones(size, dtype=torch.long),
        scores=Scores(torch.tensor(rewards), {}, [None] * size),
        group=torch.arange(2).repeat_interleave(size // 2),
        lengths=torch.tensor(rollouts.lengths),
        engine_logprobs=rollouts.engine_logprobs,
    )


def found(data: Experience) -> tuple[list[list[int]], list[float]]:
    assert data.pairs is not None
    why = ("dpo/skipped_malformed", "dpo/skipped_margin", "dpo/skipped_length")
    assert data.metrics["dpo/pairs"] == len(data.pairs)
    return data.pairs.tolist(), [data.metrics[name] for name in why]


@pytest.mark.parametrize(
    ("options", "pairs", "why"),
    [
        ({}, [[2, 0], [3, 5]], [0, 0, 0]),
        ({"min_valid": 3}, [[2, 0]], [1, 0, 0]),
        ({"min_margin": 3.0}, [[3, 5]], [0, 1, 0]),
        ({"max_tokens": 11}, [[2, 0], [3, 5]], [0, 0, 0]),  # prompt of 5 and completion of 6
        ({"max_tokens": 10}, [[2, 0]], [0, 0, 1]),
        ({"max_tokens": None}, [[2, 0], [3, 5]], [0, 0, 0]),
    ],
)
def test_select_finds_pairs_and_counts_skipped_prompts(
    options: dict[str, Any], pairs: list[list[int]], why: list[float]
) -> None:
    data = experience([1.0, 2.0, 3.0, 4.0, 0.0, 1.0], [True] * 4 + [False, True], truncated=(2,))
    DPO(**({"min_valid": 2} | options)).select(data)
    assert found(data) == (pairs, why)
    assert data.advantages is None
    assert not any(name in data.metrics for name in PAIR_METRICS)


def test_metrics_of_a_step_without_pairs_are_nan() -> None:
    data = experience([1.0] * 6, [True] * 6)
    DPO(min_valid=2).select(data)
    assert found(data) == ([], [0, 2, 0])
    assert all(math.isnan(data.metrics[name]) for name in PAIR_METRICS)


def test_seed_breaks_ties_the_same_way_in_every_epoch() -> None:
    picks = set()
    for seed in range(20):
        data, later = (experience([1.0, 1.0, 0.0, 2.0, 2.0, 1.0], [True] * 6) for _ in range(2))
        later.rollouts.epoch = 1
        for one in (data, later):
            DPO(min_valid=2, seed=seed).select(one)
        assert found(data) == found(later)
        picks.add(str(found(data)[0]))
    assert picks == {str([[a, 2], [b, 5]]) for a in (0, 1) for b in (3, 4)}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beta": 0.0}, "beta"),
        ({"min_valid": 1}, "min_valid"),
        ({"min_margin": -1.0}, "min_margin"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"update_epochs": 0}, "update_epochs"),
        ({"minibatches": 0}, "minibatches"),
    ],
)
def test_options_out_of_range_raise_with_their_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"DPO.{named} is"):
        DPO(**options)


@pytest.mark.parametrize(
    ("group_size", "min_valid", "good"), [(1, 2, False), (3, 4, False), (4, 4, True), (2, 2, True)]
)
def test_group_smaller_than_min_valid_raises(group_size: int, min_valid: int, good: bool) -> None:
    dpo = DPO(min_valid=min_valid)
    if good:
        dpo.check(group_size)
    else:
        with pytest.raises(UserError, match=f"group_size is {group_size}"):
            dpo.check(group_size)


def test_dpo_always_needs_the_reference() -> None:
    assert DPO().needs_reference and not DPO().needs_old_logprobs
