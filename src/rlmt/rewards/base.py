"""The Reward protocol: a module that scores responses to prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rlmt.formats.chat_template import TEMPLATE_DATE
from rlmt.types import Prompt, Status


class Reward(nn.Module):
    """Scores responses. It receives the prompt and the response text, never a thought.

    A `Reward` is an `nn.Module` so that the trainer moves a reward model in it to the device. It is always frozen. The
    constructor only stores options; `check` validates them without loading weights, and `load` loads the weights.
    """

    name: str = "reward"
    """Name under which the scores are logged."""
    template_date: str = TEMPLATE_DATE
    """Day that the chat template of a reward model prints if it prints one; the same as for the policy in a run."""
    resume: str = "resume with --ckpt_path last"
    """What continues the command after an error of the reward stopped it; the end of its messages."""
    asks: bool = False
    """Whether it sends responses to another process; such a reward never receives a malformed completion."""

    @property
    def part_names(self) -> list[str]:
        """Names of the parts that `score_parts` reports."""
        return [self.name]

    @property
    def columns(self) -> set[str]:
        """The columns of the prompt set that it reads in `Prompt.extra`."""
        return set()

    def check(self) -> None:
        """Raises UserError for errors that can be found before any weights are loaded."""

    def load(self) -> None:
        """Loads weights, if any; called once, before the trainer moves the module to its device."""

    def prefetch(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> None:
        """Starts the requests for responses that `score` will receive, if it has any to make, and does not wait.

        Log-probs are computed while they are answered. An error of a request is raised by `score`.

        Args:
            prompts: B prompts, as in `score`.
            responses: B response texts, as in `score`.
            statuses: B split statuses, as in `score`.
        """

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

    def running_state(self) -> dict[str, Any]:
        """The state that changes with every training batch, as plain data; saved in checkpoints."""
        return {}

    def load_running_state(self, state: Mapping[str, Any]) -> None:
        """Loads a state that `running_state` returned."""

    def close(self) -> None:
        """Closes connections and files, if any; called when a run ends."""


def all_rewards(rewards: nn.Module) -> list[Reward]:
    """A reward and the rewards inside it, such as the parts of a sum; of a list of rewards those of all of them."""
    return [module for module in rewards.modules() if isinstance(module, Reward)]


def running_states(rewards: nn.Module) -> dict[str, Any]:
    """Every `running_state` that is not empty, by the position of its reward in `all_rewards`."""
    states = {str(number): reward.running_state() for number, reward in enumerate(all_rewards(rewards))}
    return {number: state for number, state in states.items() if state}


def load_running_states(rewards: nn.Module, states: Mapping[str, Any]) -> None:
    """Loads what `running_states` returned; rewards without a saved state keep theirs."""
    for number, reward in enumerate(all_rewards(rewards)):
        if str(number) in states:
            reward.load_running_state(states[str(number)])


def set_template_date(rewards: nn.Module, date: str) -> None:
    """Sets the day that chat templates print in a reward and in the rewards that it contains."""
    for reward in all_rewards(rewards):
        reward.template_date = date


def set_resume(rewards: nn.Module, resume: str) -> None:
    """Sets what continues the command after an error, in a reward and in the rewards that it contains."""
    for reward in all_rewards(rewards):
        reward.resume = resume
