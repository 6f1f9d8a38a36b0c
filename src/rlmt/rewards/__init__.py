"""Rewards that score responses to prompts, and the function that selects the text they see."""

from rlmt.rewards.base import Reward
from rlmt.rewards.classifier import ClassifierReward
from rlmt.rewards.judge import JudgeReward
from rlmt.rewards.pairwise import PairwiseJudgeReward
from rlmt.rewards.remote import RemoteReward
from rlmt.rewards.rubric import RubricReward
from rlmt.rewards.rules import CallableReward, FormatReward, LengthWindow, RegexReward
from rlmt.rewards.scoring import MalformedMode, score
from rlmt.rewards.served import ServedReward
from rlmt.rewards.shuffled import ShuffledReward
from rlmt.rewards.weighted import WeightedSum

__all__ = [
    "CallableReward",
    "ClassifierReward",
    "FormatReward",
    "JudgeReward",
    "LengthWindow",
    "MalformedMode",
    "PairwiseJudgeReward",
    "RegexReward",
    "RemoteReward",
    "Reward",
    "RubricReward",
    "ServedReward",
    "ShuffledReward",
    "WeightedSum",
    "score",
]
