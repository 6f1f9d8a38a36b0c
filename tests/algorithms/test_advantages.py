"""Group advantages against numbers worked out by hand."""

import pytest
import torch

from rlmt.algorithms.advantages import group_advantages


def test_without_std_the_advantage_is_the_distance_from_the_groups_mean() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, -1.0, 0.0, 4.0])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    # means 3 and 1
    assert group_advantages(rewards, group, False).tolist() == [-2.0, -1.0, 3.0, -2.0, -1.0, 3.0]


def test_with_std_it_is_divided_by_the_unbiased_standard_deviation() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0])
    # variance ((-2)² + (-1)² + 3²) / 2 = 7
    expected = torch.tensor([-2.0, -1.0, 3.0]) / (7**0.5 + 1e-6)
    torch.testing.assert_close(group_advantages(rewards, torch.zeros(3, dtype=torch.long), True), expected)


@pytest.mark.parametrize("size", [2, 3, 6, 7, 8])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.7, 1e6 + 0.1])
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_rewards_give_exactly_zero(size: int, value: float, normalize: bool) -> None:
    rewards = torch.full((size,), value)
    assert group_advantages(rewards, torch.zeros(size, dtype=torch.long), normalize).tolist() == [0.0] * size


def test_groups_may_be_interleaved_and_uneven() -> None:
    rewards = torch.tensor([1.0, 10.0, 3.0, 20.0, 5.0])
    group = torch.tensor([0, 1, 0, 1, 0])
    assert group_advantages(rewards, group, False).tolist() == [-2.0, -5.0, 0.0, 5.0, 2.0]
