"""Data modules for rollouts, demonstrations and preferences, and the order of rows over epochs and ranks."""

from rlmt.data.demonstrations import SFTDataModule
from rlmt.data.generation import PolicySource
from rlmt.data.preferences import PreferenceDataModule
from rlmt.data.prompts import PromptDataset, load_prompts
from rlmt.data.rollout_datamodule import RolloutDataModule
from rlmt.data.sampler import PromptSampler, sample_seed, shuffled

__all__ = [
    "PolicySource",
    "PreferenceDataModule",
    "PromptDataset",
    "PromptSampler",
    "RolloutDataModule",
    "SFTDataModule",
    "load_prompts",
    "sample_seed",
    "shuffled",
]
