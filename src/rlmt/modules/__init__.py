"""The LightningModules."""

from rlmt.modules.optimizers import CosineWithWarmup, MuonAdamW
from rlmt.modules.reward_modeling import RewardModeling
from rlmt.modules.rlmt import RLMTModule
from rlmt.modules.sft import SFT

__all__ = ["SFT", "CosineWithWarmup", "MuonAdamW", "RLMTModule", "RewardModeling"]
