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
    control = AdaptiveKL(1.0, target=2.0, horizon=10)
    control.update(0.0, samples=1000)  # the plain formula gives -19
    assert control.coef == pytest.approx(0.8**100)


@pytest.mark.parametrize("kl", [0.0, 1.9, 2.3, 50.0])
@pytest.mark.parametrize("samples", [64, 100, 250, 1999])
def test_step_longer_than_the_horizon_equals_steps_of_one_horizon(kl: float, samples: int) -> None:
    control, slow = AdaptiveKL(0.3, target=2.0, horizon=100), AdaptiveKL(0.3, target=2.0, horizon=100)
    control.update(kl, samples)
    for start in range(0, samples, 100):
        slow.update(kl, min(100, samples - start))
    assert control.coef == pytest.approx(slow.coef, rel=1e-12)
