"""The objectives, one a file."""

from rlmt.algorithms.base import Algorithm, CriticOptions
from rlmt.algorithms.grpo import GRPO
from rlmt.algorithms.policy_gradient import PolicyGradient
from rlmt.algorithms.ppo import PPO

__all__ = ["GRPO", "PPO", "Algorithm", "CriticOptions", "PolicyGradient"]
