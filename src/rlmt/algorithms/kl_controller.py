"""A KL coefficient that is steered towards a wanted distance from the reference."""

from __future__ import annotations

MAX_ERROR = 0.2
"""Largest relative error that one step answers."""


class AdaptiveKL:
    """Proportional controller in log space (Ziegler et al., arXiv 1909.08593, section 2.2).

    e = clip(KL / target - 1, -0.2, 0.2);  coefficient ← coefficient · (1 + e · samples / horizon).

    Args:
        coef: the coefficient to begin with, > 0.
        target: wanted KL(policy ‖ reference) of a whole completion, in nats.
        horizon: samples that full errors need to change the coefficient by a fifth; the paper's K = 0.1 at one step is
            ten times the samples of a step.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, samples: int) -> None:
        """Answers one step.

        Args:
            kl: KL of a completion in nats, the mean over the step's samples.
            samples: how many these were.
        """
        error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
        self.coef *= 1 + error * min(samples / self.horizon, 1.0)
