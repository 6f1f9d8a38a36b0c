"""Rewards: whatever scores a response to a prompt, and the one function that decides what text they see."""

from rlmt.rewards.base import Reward
from rlmt.rewards.classifier import ClassifierReward
from rlmt.rewards.rules import CallableReward, FormatReward, LengthWindow, RegexReward
from rlmt.rewards.scoring import MalformedMode, score
from rlmt.rewards.shuffled import ShuffledReward
from rlmt.rewards.weighted import WeightedSum

__all__ = [
    "CallableReward",
    "ClassifierReward",
    "FormatReward",
    "LengthWindow",
    "MalformedMode",
    "RegexReward",
    "Reward",
    "ShuffledReward",
    "WeightedSum",
    "score",
]
