"""Loss terms equal numbers calculated by hand."""

import math

import pytest
import torch

from rlmt.algorithms import policy_loss
from rlmt.algorithms.policy_loss import KLEstimator

LOG2 = math.log(2)


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "loss", "slope"),
    [
        # A > 0: -min(rA, clip(r)A); the gradient by the log-ratio is -rA inside the clip range and 0 outside
        (1.0, 2.0, None, -2.0, -2.0),
        (1.1, 2.0, None, -2.2, -2.2),
        (2.0, 2.0, None, -2.6, 0.0),  # clipped at 1.3
        (0.5, 2.0, None, -1.0, -1.0),  # below the range, but the unclipped value is the smaller one
        # A < 0
        (1.0, -2.0, None, 2.0, 2.0),
        (0.5, -2.0, None, 1.6, 0.0),  # clipped at 0.8
        (2.0, -2.0, None, 4.0, 4.0),  # never clipped above ...
        (4.0, -2.0, 3.0, 6.0, 0.0),  # ... but by the dual clip at 3·|A|
        (2.0, -2.0, 3.0, 4.0, 4.0),
        (4.0, 2.0, 3.0, -2.6, 0.0),  # which does not change positive advantages
    ],
)
def test_clipped_surrogate(ratio: float, advantage: float, dual: float | None, loss: float, slope: float) -> None:
    log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
    got = policy_loss.clipped_surrogate(log_ratio, torch.tensor([advantage]), 0.2, 0.3, dual)
    assert got.item() == pytest.approx(loss, rel=1e-6)
    got.sum().backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad.item() == pytest.approx(slope, abs=1e-6)


def test_loss_of_an_extreme_ratio_is_finite() -> None:
    got = policy_loss.clipped_surrogate(torch.tensor([500.0]), torch.tensor([-1.0]), 0.2, 0.2, None)
    assert got.item() == pytest.approx(math.exp(20), rel=1e-5)


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        # policy twice as likely as the reference: d = log 2; k3 = 1/2 - 1 + log 2, its slope 1 - exp(-d)
        ("k1", LOG2, 1.0),
        ("k2", LOG2**2 / 2, LOG2),
        ("k3", LOG2 - 0.5, 0.5),
    ],
)
def test_kl_estimators(estimator: KLEstimator, value: float, slope: float) -> None:
    logprobs = torch.tensor([math.log(0.5)], requires_grad=True)
    got = policy_loss.kl_penalty(logprobs, torch.tensor([math.log(0.25)]), estimator)
    assert got.item() == pytest.approx(value, rel=1e-6)
    got.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(
    ("d", "clamp", "value", "slope"),
    [
        (-2.0, None, math.exp(2) - 3, 1 - math.exp(2)),
        (-25.0, None, math.exp(20) - 21, 0.0),  # not 1, which would push the policy further away
        (25.0, None, 24.0, 1.0),
        (-2.0, 10.0, math.exp(2) - 3, 1 - math.exp(2)),
        (-3.0, 10.0, 10.0, 0.0),  # exp(3) - 4 = 16.1
        (-25.0, 10.0, 10.0, 0.0),
        (10.9, 10.0, 9.9 + math.exp(-10.9), 1.0),
        (12.0, 10.0, 10.0, 0.0),
    ],
)
def test_k3_far_from_the_reference(d: float, clamp: float | None, value: float, slope: float) -> None:
    logprobs = torch.tensor([d - 30], dtype=torch.float64, requires_grad=True)
    got = policy_loss.kl_penalty(logprobs, torch.tensor([-30.0], dtype=torch.float64), "k3", clamp)
    assert got.item() == pytest.approx(value, rel=1e-9)
    got.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_k1_is_clamped_on_both_sides() -> None:
    got = policy_loss.kl_penalty(torch.tensor([-30.0, -3.0, 0.0]), torch.tensor([-3.0, -30.0, -1.0]), "k1", 10.0)
    assert got.tolist() == [-10.0, 10.0, 1.0]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_mean_of_kl_estimators_is_the_true_kl(estimator: KLEstimator) -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    mean = (p * policy_loss.kl_penalty(p.log(), q.log(), estimator)).sum()
    assert mean.item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)


def test_truncated_importance() -> None:
    trainer = torch.tensor([math.log(0.5), math.log(0.1), math.log(0.9)], requires_grad=True)
    weights = policy_loss.truncated_importance(
        trainer, torch.tensor([math.log(0.25), math.log(0.2), math.log(0.1)]), 2.5
    )
    torch.testing.assert_close(weights, torch.tensor([2.0, 0.5, 2.5]))
    assert not weights.requires_grad


def test_token_weights() -> None:
    lengths, everyone = torch.tensor([1, 3]), torch.tensor([True, True])
    assert policy_loss.token_weights(lengths, everyone, "token_mean", 10).tolist() == [0.25] * 4
    torch.testing.assert_close(
        policy_loss.token_weights(lengths, everyone, "sequence_mean", 10), torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6])
    )
    torch.testing.assert_close(policy_loss.token_weights(lengths, everyone, "constant", 10), torch.full((4,), 1 / 20))


def test_masked_samples_have_no_weight_and_no_part_in_denominators() -> None:
    lengths, mask = torch.tensor([2, 3, 1]), torch.tensor([True, False, True])
    for how, first, last in (
        ("token_mean", 1 / 3, 1 / 3),
        ("sequence_mean", 1 / 4, 1 / 2),
        ("constant", 1 / 20, 1 / 20),
    ):
        weights = policy_loss.token_weights(lengths, mask, how, 10)  # type: ignore[arg-type]
        torch.testing.assert_close(weights, torch.tensor([first, first, 0.0, 0.0, 0.0, last]))
    assert policy_loss.token_weights(lengths, torch.zeros(3, dtype=torch.bool), "token_mean", 10).sum() == 0
