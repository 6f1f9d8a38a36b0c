"""Prompts, their order over epochs and ranks, and the data module that turns them into rollouts."""

from rlmt.data.datamodule import RolloutDataModule
from rlmt.data.preferences import PreferenceDataModule
from rlmt.data.prompts import PromptDataset, load_prompts
from rlmt.data.rollouts import PolicySource
from rlmt.data.sampler import PromptSampler, sample_seed, shuffled
from rlmt.data.sft import SFTDataModule

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
