"""A control: the same scores, dealt out at random."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from rlmt.rewards.base import Reward
from rlmt.types import Message, Status


class ShuffledReward(Reward):
    """Deals the scores of a prompt's responses out among them at random.

    What a policy still learns from it comes from elsewhere than the reward: thoughts that grow under it do not grow
    because they pay. Chance follows from the texts, so a resumed run is dealt the same scores. Malformed samples are no
    part of it: what they get is not a reward's to say.

    Args:
        reward: Whose scores are dealt out.

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
        """Checks the reward within."""
        self.reward.check()

    def load(self) -> None:
        """Loads the reward within."""
        self.reward.load()

    def score(self, prompts: Sequence[list[Message]], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """See `Reward.score`."""
        scores = self.reward.score(prompts, responses, statuses)
        groups: dict[str, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            groups[json.dumps(prompt, sort_keys=True)].append(row)
        source = torch.arange(len(scores))
        for prompt_text, rows in groups.items():
            chance = random.Random("\0".join([prompt_text, *(responses[row] for row in rows)]))
            source[rows] = torch.tensor(chance.sample(rows, len(rows)))
        return scores[source]
