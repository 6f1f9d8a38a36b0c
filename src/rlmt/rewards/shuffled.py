"""A control experiment: the same scores in random order."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from rlmt.rewards.base import Reward
from rlmt.types import Prompt, Status


class ShuffledReward(Reward):
    """Randomly permutes the scores of a prompt's responses.

    Whatever a policy learns from it is not an effect of the reward: thoughts that get longer under it do not get longer
    because they are rewarded. The permutation is seeded by the texts, so a resumed run gets the same scores. Scores of
    malformed samples are not permuted, because no reward determines them.

    Args:
        reward: The reward with the scores to permute.

    Example:
        In a configuration::

            class_path: rlmt.rewards.ShuffledReward
            init_args:
              reward:
                class_path: rlmt.rewards.ClassifierReward
                init_args: {model: Skywork/Skywork-Reward-Llama-3.1-8B-v0.2}
    """

    name = "shuffled"

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        self.reward = reward

    def check(self) -> None:
        """Checks the inner reward."""
        self.reward.check()

    def load(self) -> None:
        """Loads the inner reward."""
        self.reward.load()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """See `Reward.score`."""
        scores = self.reward.score(prompts, responses, statuses)
        groups: dict[str, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            groups[json.dumps(prompt.messages, sort_keys=True)].append(row)
        source = torch.arange(len(scores))
        for prompt_text, rows in groups.items():
            generator = random.Random("\0".join([prompt_text, *(responses[row] for row in rows)]))
            source[rows] = torch.tensor(generator.sample(rows, len(rows)))
        return scores[source]
