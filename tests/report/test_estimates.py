"""Estimates of ratios against numbers by hand."""

import pytest

from rlmt.report.estimates import Estimate


def test_ratio_of_sums_has_linearized_values() -> None:
    estimate = Estimate.of_ratio([2.0, 9.0], [1.0, 3.0])
    assert estimate.values == pytest.approx((2.375, 3.125))  # 11/4 ∓ 0.75 / 2
    assert estimate.mean == pytest.approx(11 / 4)


def test_ratio_with_equal_weights_is_the_mean_of_the_samples() -> None:
    assert Estimate.of_ratio([2.0, 4.0, 9.0], [2.0, 2.0, 2.0]).values == pytest.approx((1.0, 2.0, 4.5))
