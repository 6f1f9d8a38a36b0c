"""The adaptive KL coefficient equals numbers calculated by hand."""

import pytest

from rlmt.algorithms.kl_controller import AdaptiveKL


def test_coefficient_follows_the_relative_error() -> None:
    control = AdaptiveKL(0.5, target=4.0, horizon=100)
    for kl, factor in ((4.4, 1 + 0.1 * 0.1), (3.8, 1 - 0.05 * 0.1), (4.0, 1.0)):
        before = control.coef
        control.update(kl, samples=10)
        assert control.coef == pytest.approx(before * factor, rel=1e-12)


def test_large_errors_are_clipped_to_a_fifth() -> None:
    control = AdaptiveKL(1.0, target=2.0, horizon=1000)
    control.update(500.0, samples=500)
    assert control.coef == pytest.approx(1.1)
    control.update(-3.0, samples=500)  # estimates of a small KL can be negative
    assert control.coef == pytest.approx(1.1 * 0.9)


def test_coefficient_is_positive_after_a_step_longer_than_the_horizon() -> None:
    control = AdaptiveKL(1.0, target=2.0, horizon=1)
    control.update(0.0, samples=1000)
    assert control.coef == pytest.approx(0.8)
