"""Adaptive KL coefficient, which keeps the KL to the reference near a target."""

from __future__ import annotations

MAX_ERROR = 0.2
"""Maximum relative error of one step; larger errors are clipped."""


class AdaptiveKL:
    """Proportional controller in log space (Ziegler et al., arXiv 1909.08593, section 2.2).

    e = clip(KL / target - 1, -0.2, 0.2);  coefficient ← coefficient · (1 + e · samples / horizon).

    A step of more samples than the horizon counts as steps of one horizon each and a rest, all with the same error.
    The formula itself would make the coefficient negative for a step of more than five horizons.

    Args:
        coef: Initial coefficient, > 0.
        target: Target KL(policy ‖ reference) of a completion, in nats.
        horizon: Number of samples after which a clipped error has changed the coefficient by a fifth; the paper's
            K = 0.1 per step equals ten times the samples of a step.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, samples: int) -> None:
        """Updates the coefficient after one step.

        Args:
            kl: Mean KL of a completion over the step's samples, in nats.
            samples: Number of samples of the step.
        """
        error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
        horizons, rest = divmod(samples, self.horizon)
        self.coef *= (1 + error) ** horizons * (1 + error * (rest / self.horizon))
