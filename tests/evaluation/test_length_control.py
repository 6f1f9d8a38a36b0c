"""Length control against fits of scipy and scikit-learn."""

import math
import time

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from rlmt.evaluation.length_control import (
    authors_win_rate,
    controlled_win_rate,
    fit_logistic,
    length_controlled_win_rate,
)

RANDOM = np.random.default_rng(1)
LENGTHS = RANDOM.normal(200, 900, 300).round()
DIFFICULTY = RANDOM.normal(0, 1, 300)
PREFERENCES = 1 / (1 + np.exp(-(-0.5 + 1.5 * np.tanh(LENGTHS / 900) + 0.7 * DIFFICULTY + RANDOM.normal(0, 1, 300))))


def slow_fit(features: np.ndarray, targets: np.ndarray, weights: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    def loss(c: np.ndarray) -> float:
        p = 1 / (1 + np.exp(-features @ c))
        entropy = -(targets * np.log(p) + (1 - targets) * np.log(1 - p))
        return float((weights * entropy).sum() + (ridge * c**2).sum() / 2)

    return np.asarray(minimize(loss, np.zeros(features.shape[1]), method="BFGS", options={"gtol": 1e-7}).x)


def test_fit_equals_a_general_optimizer() -> None:
    features = np.column_stack([np.ones(300), LENGTHS / 900, DIFFICULTY])
    weights, ridge = RANDOM.uniform(0.5, 3, 300), np.array([0.1, 1.0, 2.0])
    fitted = fit_logistic(features, PREFERENCES, weights, ridge)
    np.testing.assert_allclose(fitted, slow_fit(features, PREFERENCES, weights, ridge), atol=1e-5)


def test_alpaca_formula_equals_a_general_optimizer() -> None:
    scaled = np.tanh(LENGTHS / LENGTHS.std(ddof=1))
    theta, _, psi = slow_fit(np.column_stack([np.ones(300), scaled, DIFFICULTY]), PREFERENCES, np.ones(300), np.ones(3))
    expected = np.mean(1 / (1 + np.exp(-(theta + psi * DIFFICULTY))))
    found = length_controlled_win_rate(PREFERENCES.tolist(), LENGTHS.tolist(), DIFFICULTY.tolist())
    assert found == pytest.approx(expected, abs=1e-5)


def test_without_difficulty_it_is_the_win_rate_at_equal_lengths() -> None:
    scaled = np.tanh(LENGTHS / LENGTHS.std(ddof=1))
    theta, _ = slow_fit(np.column_stack([np.ones(300), scaled]), PREFERENCES, np.ones(300), np.array([1e-6, 1.0]))
    found = length_controlled_win_rate(PREFERENCES.tolist(), LENGTHS.tolist())
    assert found == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-5)


def test_swapped_models_have_the_complement() -> None:
    found = length_controlled_win_rate(PREFERENCES.tolist(), LENGTHS.tolist())
    swapped = length_controlled_win_rate((1 - PREFERENCES).tolist(), (-LENGTHS).tolist())
    assert found + swapped == pytest.approx(1, abs=1e-9)


def test_authors_formula_is_their_scikit_learn_fit() -> None:
    wins, words = (PREFERENCES > 0.5).astype(int), (LENGTHS / 6).round()
    model = np.repeat([1, 0], 300)
    features = np.column_stack([model, 1 - model, np.concatenate([words, -words])])
    fit = LogisticRegression(fit_intercept=True, solver="lbfgs").fit(features, np.concatenate([wins, 1 - wins]))
    expected = fit.predict_proba([[1, 0, 0]])[0, 1]
    assert authors_win_rate(wins.tolist(), words.tolist()) == pytest.approx(expected, abs=1e-4)


def test_equal_lengths_leave_the_win_rate() -> None:
    assert length_controlled_win_rate([1.0, 1.0, 0.0, 0.5], [7.0] * 4) == pytest.approx(0.625, abs=1e-6)


@pytest.mark.parametrize("won", [0.0, 1.0])
def test_one_sided_preferences_have_a_finite_fit(won: float) -> None:
    assert length_controlled_win_rate([won] * 20, list(range(20))) == pytest.approx(won, abs=1e-3)
    assert length_controlled_win_rate([won], [5.0]) == pytest.approx(won, abs=1e-3)


def test_no_preferences_are_nan() -> None:
    assert math.isnan(length_controlled_win_rate([], []))
    assert math.isnan(authors_win_rate([], [])) and math.isnan(controlled_win_rate([], []))


def test_a_thousand_resamples_take_seconds() -> None:
    preferences, lengths, difficulty = (
        np.tile(values, 3)[:805].tolist() for values in (PREFERENCES, LENGTHS, DIFFICULTY)
    )
    start = time.process_time()
    for _ in range(100):
        length_controlled_win_rate(preferences, lengths, difficulty)
    assert time.process_time() - start < 2
