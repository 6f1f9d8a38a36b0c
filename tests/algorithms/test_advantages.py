"""Advantages equal numbers calculated by hand and slow loops."""

import math

import pytest
import torch

from rlmt.algorithms.advantages import (
    explained_variance,
    generalized_advantages,
    group_advantages,
    rewards_on_last_tokens,
    whitened,
)


def test_advantage_without_std_is_the_difference_from_the_group_mean() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, -1.0, 0.0, 4.0])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    # means 3 and 1
    assert group_advantages(rewards, group, False).tolist() == [-2.0, -1.0, 3.0, -2.0, -1.0, 3.0]


def test_advantage_with_std_is_divided_by_the_unbiased_standard_deviation() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0])
    # variance ((-2)² + (-1)² + 3²) / 2 = 7
    expected = torch.tensor([-2.0, -1.0, 3.0]) / (7**0.5 + 1e-6)
    torch.testing.assert_close(group_advantages(rewards, torch.zeros(3, dtype=torch.long), True), expected)


@pytest.mark.parametrize("size", [2, 3, 6, 7, 8])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.7, 1e6 + 0.1])
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_rewards_have_advantage_exactly_zero(size: int, value: float, normalize: bool) -> None:
    rewards = torch.full((size,), value)
    assert group_advantages(rewards, torch.zeros(size, dtype=torch.long), normalize).tolist() == [0.0] * size


def test_groups_can_be_interleaved_and_differ_in_size() -> None:
    rewards = torch.tensor([1.0, 10.0, 3.0, 20.0, 5.0])
    group = torch.tensor([0, 1, 0, 1, 0])
    assert group_advantages(rewards, group, False).tolist() == [-2.0, -5.0, 0.0, 5.0, 2.0]


def test_score_is_on_the_last_token() -> None:
    rewards = rewards_on_last_tokens(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([3, 1, 2]))
    assert rewards.tolist() == [0.0, 0.0, 2.0, -1.0, 0.0, 0.5]


def test_gae_equals_a_calculation_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 5.0])
    rewards = torch.tensor([0.0, 0.0, 10.0, 4.0])
    advantages, returns = generalized_advantages(rewards, values, torch.tensor([3, 1]), gamma=0.5, lam=0.5)
    # δ = 0 + 3/2 - 2 and so on: 0, -1/2, 7 | -1;  A = 0 + 1.25/4, -1/2 + 7/4, 7 | -1
    assert advantages.tolist() == [0.3125, 1.25, 7.0, -1.0]
    assert returns.tolist() == [1.3125, 3.25, 10.0, 4.0]


@pytest.mark.parametrize("gamma", [1.0, 0.97])
@pytest.mark.parametrize("lam", [1.0, 0.9, 0.0])
def test_gae_equals_a_loop_over_tokens(gamma: float, lam: float) -> None:
    make = torch.Generator().manual_seed(0)
    lengths = [1, 7, 30, 2, 1, 13]
    values, rewards = (torch.randn(sum(lengths), generator=make) for _ in range(2))
    expected, start = [], 0
    for length in lengths:
        v, r = values[start : start + length].tolist(), rewards[start : start + length].tolist()
        for t in range(length):  # the sum of all discounted temporal differences, each from its definition
            deltas = [r[k] + gamma * (v[k + 1] if k + 1 < length else 0.0) - v[k] for k in range(t, length)]
            expected.append(sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas)))
        start += length
    advantages, returns = generalized_advantages(rewards, values, torch.tensor(lengths), gamma, lam)
    torch.testing.assert_close(advantages, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns, torch.tensor(expected) + values, rtol=1e-5, atol=1e-5)
    if gamma == lam == 1:  # the sum of later rewards, independent of the critic
        togo = torch.cat([part.flip(0).cumsum(0).flip(0) for part in rewards.split(lengths)])
        torch.testing.assert_close(returns, togo, rtol=1e-5, atol=1e-5)


def test_whitening_uses_unmasked_tokens() -> None:
    advantages = torch.tensor([1.0, 100.0, 3.0, 5.0, -50.0])
    mask = torch.tensor([True, False, True, True, False])
    # of 1, 3, 5: mean 3, unbiased standard deviation 2
    torch.testing.assert_close(whitened(advantages, mask), torch.tensor([-1.0, 48.5, 0.0, 1.0, -26.5]))
    assert whitened(advantages, torch.zeros(5, dtype=torch.bool)).tolist() == [0.0] * 5
    assert whitened(torch.full((3,), 0.1), torch.ones(3, dtype=torch.bool)).tolist() == [0.0] * 3


def test_explained_variance_equals_a_calculation_by_hand() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0])  # variance 14 / 4
    assert explained_variance(returns + 5, returns) == 1.0  # a constant error has no variance
    assert explained_variance(torch.ones(4), returns) == 0.0
    # errors 1, 0, 0, 1: variance 1 / 4
    assert explained_variance(returns - torch.tensor([1.0, 0, 0, 1.0]), returns) == pytest.approx(1 - 1 / 14)
    assert explained_variance(-returns, returns) == -3.0
    assert math.isnan(explained_variance(returns, torch.ones(4)))
    assert math.isnan(explained_variance(torch.zeros(0), torch.zeros(0)))
