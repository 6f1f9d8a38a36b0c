"""Prompts, their order over epochs and ranks, and the data module that turns them into rollouts."""

from rlmt.data.datamodule import RolloutDataModule
from rlmt.data.prompts import PromptDataset, load_prompts
from rlmt.data.rollouts import PolicySource
from rlmt.data.sampler import PromptSampler, sample_seed, shuffled

__all__ = [
    "PolicySource",
    "PromptDataset",
    "PromptSampler",
    "RolloutDataModule",
    "load_prompts",
    "sample_seed",
    "shuffled",
]
