"""Splitting and scoring of rollouts: what the RL module does between generation and the objective."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rlmt.annotations import PreTrainedTokenizerBase
from rlmt.data import RolloutDataModule
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.rewards import Reward
from rlmt.rewards.held_out import HeldOutRewards
from rlmt.rewards.scoring import MalformedMode, prefetch, score
from rlmt.types import Experience, PromptBatch, RolloutBatch, Scores


class ScoringMixin:
    """Rewards of a policy's samples."""

    format: ThinkingFormat
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    reward: Reward
    held_out: HeldOutRewards
    malformed: MalformedMode
    malformed_reward: float

    @property
    def data(self) -> RolloutDataModule:
        """The data module, which owns the prompts and the engine.

        Raises:
            UserError: The trainer was given another one, or none.
        """
        trainer: Any = self.trainer  # type: ignore[attr-defined]
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, RolloutDataModule):
            raise UserError(f"--data is {type(data).__name__}, but --model RLMTModule trains on RolloutDataModule.")
        return data

    def split(self, rollouts: RolloutBatch) -> Experience:
        """Splits completions into thought and response, not scored yet."""
        texts = [self.format.decode(ids, self.tokenizer) for ids in rollouts.completion_ids]
        splits = [self.format.split(text) for text in texts]
        thought_tokens = [self.format.thought_tokens(ids, self.tokenizer) for ids in rollouts.completion_ids]
        return Experience(
            rollouts=rollouts,
            texts=texts,
            splits=splits,
            thought_tokens=torch.tensor(thought_tokens, device=self.device),
            scores=Scores.unscored(len(rollouts), self.device),
            group=torch.arange(len(rollouts.prompts), device=self.device).repeat_interleave(rollouts.group_size),
            lengths=torch.tensor(rollouts.lengths, device=self.device),
            engine_logprobs=rollouts.engine_logprobs.to(self.device),
        )

    def ask(self, experience: Experience, held_out: bool = False) -> bool:
        """Starts the requests of the rewards, with `held_out` those of the held-out rewards, too.

        Returns:
            Whether a reward asks.
        """
        rewards = nn.ModuleList([self.reward, self.held_out] if held_out else [self.reward])
        prompts = experience.rollouts.prompt_per_sample
        return prefetch(rewards, prompts, experience.splits, experience.texts, self.malformed)

    def score(self, experience: Experience) -> Experience:
        """Scores the responses of a split batch, and returns the batch."""
        prompts, splits, texts = experience.rollouts.prompt_per_sample, experience.splits, experience.texts
        experience.scores = score(self.reward, prompts, splits, texts, self.malformed, self.malformed_reward)
        experience.scores.total = experience.scores.total.to(self.device)
        return experience

    def evaluate(self, prompts: PromptBatch) -> tuple[Experience, dict[str, Scores]]:
        """Generates one sample for each held-out prompt, and scores it by all rewards; nothing is logged.

        Returns:
            The samples, scored by the training reward; and their scores by the name of each held-out reward.
        """
        experience = self.split(self.data.generate(prompts, held_out=True))
        self.ask(experience, held_out=True)
        self.score(experience)
        return experience, self.held_out.scores(experience, self.malformed, self.malformed_reward)
