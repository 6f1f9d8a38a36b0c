"""Win rates with the influence of length or style removed (https://arxiv.org/abs/2404.04475).

A logistic regression explains preferences by the model and by how the two responses differ in length. The controlled
win rate is its prediction where they do not differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

RIDGE = 1e-6
"""Penalty on the model's own term, which keeps it finite where all preferences are equal."""
PENALTY = 1.0
"""Penalty on other coefficients, scikit-learn's default: few preferences say little about the influence of length."""
MAX_STEPS = 50
"""Maximum number of Newton steps; a fit takes about six."""


def length_controlled_win_rate(
    preferences: Sequence[float], length_differences: Sequence[float], difficulty: Sequence[float] | None = None
) -> float:
    """Win rate of a model at equal lengths, by the formula of AlpacaEval 2.

    With d the length difference divided by its standard deviation and g the difficulty of the instruction, it fits
    logit p = theta + phi * tanh(d) + psi * g, and returns the mean of sigmoid(theta + psi * g). The official fit
    chooses an L1 penalty by cross-validation and adds annotations of the baseline with prompts to be brief or verbose,
    which have no counterpart for other judges. With difficulties, an L2 penalty of 1 on all three terms takes their
    place: on published annotations the result is 0.6 points from the official one in the mean.

    Args:
        preferences: [N] Preferences for the model, 0 to 1.
        length_differences: [N] Length of the model's response minus the other's, in any unit.
        difficulty: [N] Difficulty of the instructions; None for prompts without one, which leaves the term out.

    Returns:
        The win rate, 0 to 1; nan for no preferences.
    """
    lengths = np.tanh(scaled(length_differences))
    if difficulty is None:
        return controlled_win_rate(preferences, [lengths])
    return controlled_win_rate(preferences, [lengths, np.asarray(difficulty, float)], kept=1, penalty=PENALTY)


def controlled_win_rate(
    preferences: Sequence[float],
    columns: Sequence[Vector],
    kept: int = 0,
    weights: Sequence[float] | None = None,
    penalty: float = RIDGE,
) -> float:
    """Win rate of a model where all columns but the last `kept` ones are 0.

    Args:
        preferences: [N] Preferences for the model, 0 to 1.
        columns: Each [N] A property in which the responses or prompts differ.
        kept: Number of columns at the end that stay as they are in the prediction.
        weights: [N] Weights of the preferences; None weighs them equally.
        penalty: Penalty on the model's own term, above 0.

    Returns:
        The win rate, 0 to 1; nan for no preferences.
    """
    if len(preferences) == 0:
        return math.nan
    features = np.column_stack([np.ones(len(preferences)), *columns])
    mass = np.ones(len(preferences)) if weights is None else np.asarray(weights, float)
    ridge = np.array([penalty, *(PENALTY for _ in columns)])
    coefficients = fit_logistic(features, np.asarray(preferences, float), mass, ridge)
    features[:, 1 : features.shape[1] - kept] = 0
    return float(np.average(_sigmoid(features @ coefficients), weights=mass))


def scaled(values: Sequence[float] | Vector) -> Vector:
    """Values divided by their standard deviation, as in pandas with N - 1; 0 where they are all equal.

    Args:
        values: [N] Values.

    Returns:
        [N] scaled values.
    """
    array = np.asarray(values, float)
    return array / array.std(ddof=1) if len(array) > 1 and np.ptp(array) > 0 else np.zeros(len(array))


def authors_win_rate(preferences: Sequence[float], word_differences: Sequence[float]) -> float:
    """Length-controlled win rate as in the code of the RLMT paper.

    The code fits a logistic regression with scikit-learn's defaults on every comparison twice, once for each of the two
    models, with an intercept, an indicator of each model and the raw difference in words. By symmetry the intercept is
    0 and the indicators' coefficients are w and -w, so that the fit minimizes
    sum(loss(w + b * difference)) + w^2 / 2 + b^2 / 4 over w and b. The win rate is sigmoid(w).

    Args:
        preferences: [N] Preferences for the model, 0 to 1.
        word_differences: [N] Words of the model's response minus the other's.

    Returns:
        The win rate, 0 to 1; nan for no preferences.
    """
    if len(preferences) == 0:
        return math.nan
    features = np.column_stack([np.ones(len(preferences)), np.asarray(word_differences, float)])
    ones = np.ones(len(preferences))
    return float(_sigmoid(fit_logistic(features, np.asarray(preferences, float), ones, np.array([1.0, 0.5])))[0])


def fit_logistic(features: Vector, targets: Vector, weights: Vector, ridge: Vector) -> Vector:
    """Coefficients of a logistic regression, by Newton's method with step halving.

    It minimizes sum(weights * cross-entropy(targets, sigmoid(features @ c))) + sum(ridge * c^2) / 2 over c.

    Args:
        features: [N, K] Features.
        targets: [N] Probabilities, 0 to 1.
        weights: [N] Weights.
        ridge: [K] Penalties, above 0.

    Returns:
        [K] coefficients.
    """

    def objective(coefficients: Vector) -> float:
        logits = features @ coefficients
        losses = np.logaddexp(0, logits) - targets * logits
        return float(weights @ losses + ridge @ coefficients**2 / 2)

    coefficients = np.zeros(features.shape[1])
    value = objective(coefficients)
    for _ in range(MAX_STEPS):
        probabilities = _sigmoid(features @ coefficients)
        gradient = features.T @ (weights * (probabilities - targets)) + ridge * coefficients
        curvature = features.T * (weights * probabilities * (1 - probabilities)) @ features + np.diag(ridge)
        step = np.linalg.solve(curvature, gradient)
        while (after := objective(coefficients - step)) > value + 1e-12 * abs(value):
            step /= 2
        coefficients = coefficients - step
        if value - after <= 1e-12 * (1 + abs(value)):
            break
        value = after
    return coefficients


def _sigmoid(values: Vector) -> Vector:
    return np.asarray(np.exp(-np.logaddexp(0, -values)))
