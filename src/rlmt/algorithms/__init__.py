"""The algorithms (training objectives), one per file."""

from rlmt.algorithms.base import Algorithm, CriticOptions
from rlmt.algorithms.dpo import DPO
from rlmt.algorithms.grpo import GRPO
from rlmt.algorithms.policy_gradient import PolicyGradient
from rlmt.algorithms.ppo import PPO
from rlmt.algorithms.rloo import RLOO
from rlmt.algorithms.variants import DAPO, GSPO, DrGRPO, REINFORCEPlusPlus

__all__ = [
    "DAPO",
    "DPO",
    "GRPO",
    "GSPO",
    "PPO",
    "RLOO",
    "Algorithm",
    "CriticOptions",
    "DrGRPO",
    "PolicyGradient",
    "REINFORCEPlusPlus",
]
