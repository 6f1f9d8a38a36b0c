"""Rewards that score responses to prompts, and the function that selects the text they see."""

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
