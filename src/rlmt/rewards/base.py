"""The Reward seam: whatever scores a response to a prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from rlmt.types import Message, Status


class Reward(nn.Module):
    """Scores responses. It is handed the prompt and the response text, and never a thought.

    A `Reward` is an `nn.Module` so that a reward model inside it moves with the trainer; it is always frozen. The
    constructor only stores options: `check` looks for mistakes without loading anything, `load` loads.
    """

    name: str = "reward"
    """Under which its scores are logged."""

    def check(self) -> None:
        """Raises UserError for mistakes that can be seen before any weights are read."""

    def load(self) -> None:
        """Reads weights, if there are any; called once, before the trainer moves the module to its device."""

    @abstractmethod
    def score(self, prompts: Sequence[list[Message]], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """Scores B responses.

        Args:
            prompts: B conversations as in the prompt set: no preamble or thinking instruction is in them. B may be 0.
            responses: B response texts without thoughts.
            statuses: B statuses of the completions the responses were split from; most rewards ignore them.

        Returns:
            [B] float32 scores on the CPU, all finite.
        """

    def score_parts(
        self, prompts: Sequence[list[Message]], responses: Sequence[str], statuses: Sequence[Status]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total as `score` gives it, and each part's raw scores by name."""
        total = self.score(prompts, responses, statuses)
        return total, {self.name: total}
