"""The objectives, one a file."""

from rlmt.algorithms.base import Algorithm, CriticOptions
from rlmt.algorithms.dpo import DPO
from rlmt.algorithms.grpo import GRPO
from rlmt.algorithms.policy_gradient import PolicyGradient

__all__ = ["DPO", "GRPO", "Algorithm", "CriticOptions", "PolicyGradient"]
