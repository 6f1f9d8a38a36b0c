"""The Reward protocol: a module that scores responses to prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from rlmt.formats.chat_template import TEMPLATE_DATE
from rlmt.types import Message, Status


class Reward(nn.Module):
    """Scores responses. It receives the prompt and the response text, never a thought.

    A `Reward` is an `nn.Module` so that the trainer moves a reward model in it to the device. It is always frozen. The
    constructor only stores options; `check` validates them without loading weights, and `load` loads the weights.
    """

    name: str = "reward"
    """Name under which the scores are logged."""
    template_date: str = TEMPLATE_DATE
    """Day that the chat template of a reward model prints if it prints one; the same as for the policy in a run."""

    def check(self) -> None:
        """Raises UserError for errors that can be found before any weights are loaded."""

    def load(self) -> None:
        """Loads weights, if any; called once, before the trainer moves the module to its device."""

    @abstractmethod
    def score(self, prompts: Sequence[list[Message]], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """Scores B responses.

        Args:
            prompts: B conversations as in the prompt set, without preamble or thinking instruction. B may be 0.
            responses: B response texts without thoughts.
            statuses: B split statuses of the completions; most rewards ignore them.

        Returns:
            [B] float32 scores on the CPU, all finite.
        """

    def score_parts(
        self, prompts: Sequence[list[Message]], responses: Sequence[str], statuses: Sequence[Status]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores B responses and reports the raw scores of each part.

        Args:
            prompts: B conversations, as in `score`.
            responses: B response texts, as in `score`.
            statuses: B split statuses, as in `score`.

        Returns:
            [B] float32 total, the return value of `score`; and part name → [B] float32 raw scores.
        """
        total = self.score(prompts, responses, statuses)
        return total, {self.name: total}


def set_template_date(rewards: nn.Module, date: str) -> None:
    """Sets the day that chat templates print in a reward and in the rewards that it contains."""
    for reward in rewards.modules():
        if isinstance(reward, Reward):
            reward.template_date = date
