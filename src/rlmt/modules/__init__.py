"""The LightningModules."""

from rlmt.modules.reward import RewardModeling
from rlmt.modules.rlmt import RLMTModule
from rlmt.modules.schedules import CosineWithWarmup
from rlmt.modules.sft import SFT

__all__ = ["SFT", "CosineWithWarmup", "RLMTModule", "RewardModeling"]
