"""The Reward protocol: a module that scores responses to prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from rlmt.types import Prompt, Status


class Reward(nn.Module):
    """Scores responses. It receives the prompt and the response text, never a thought.

    A `Reward` is an `nn.Module` so that the trainer moves a reward model in it to the device. It is always frozen. The
    constructor only stores options; `check` validates them without loading weights, and `load` loads the weights.
    """

    name: str = "reward"
    """Name under which the scores are logged."""

    def check(self) -> None:
        """Raises UserError for errors that can be found before any weights are loaded."""

    def load(self) -> None:
        """Loads weights, if any; called once, before the trainer moves the module to its device."""

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """Scores B responses.

        Args:
            prompts: B rows of the prompt set, one per response: `messages` is the conversation, without preamble or
                thinking instruction, and `extra` holds the row's other columns. B may be 0.
            responses: B response texts without thoughts.
            statuses: B split statuses of the completions; most rewards ignore them.

        Returns:
            [B] float32 scores on the CPU, all finite.
        """

    def score_parts(
        self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores B responses and reports the raw scores of each part.

        Args:
            prompts: B prompts, as in `score`.
            responses: B response texts, as in `score`.
            statuses: B split statuses, as in `score`.

        Returns:
            [B] float32 total, the return value of `score`; and part name → [B] float32 raw scores.
        """
        total = self.score(prompts, responses, statuses)
        return total, {self.name: total}
