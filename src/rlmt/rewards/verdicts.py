"""The base of rewards by an LLM that is asked: verdicts are read strictly, asked for again, and counted if missing."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlmt.endpoints import Call, ChatAnswer, Endpoint, chat_call
from rlmt.errors import UserError
from rlmt.rewards.asked import AskedReward
from rlmt.types import Message, Prompt, Status

Verdict = TypeVar("Verdict")

MANY = 8
"""Number of verdicts of a batch from which on none that can be read is an error of the judge and no accident."""


class VerdictReward(AskedReward):
    """A reward by an LLM whose answers end with a verdict.

    An answer whose verdict cannot be read, or that is cut off, is asked for again. What is still missing after
    `attempts` is counted in `<name>_unparsed`, the share of a response's verdicts without result. A response without
    any verdict gets the mean score of its prompt's other responses, so that it is neither better nor worse than they
    are, or the middle of the scale if none of them has one.

    Args:
        endpoint: The LLM.
        ledger: File that keeps every answer; None keeps none.
        name: Name under which the scores are logged.
        temperature: Sampling temperature of the LLM.
        max_tokens: Maximum length of an answer in tokens, hidden thinking included.
        attempts: How often a verdict that cannot be read is asked for.
    """

    middle: float
    """Score of a response if no verdict of its prompt can be read."""

    def __init__(
        self, endpoint: Endpoint, ledger: str | None, name: str, temperature: float, max_tokens: int, attempts: int
    ) -> None:
        super().__init__([endpoint], ledger, name)
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.attempts = attempts

    @property
    def part_names(self) -> list[str]:
        """The scores and the share of missing verdicts."""
        return [self.name, f"{self.name}_unparsed"]

    @abstractmethod
    def judge(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> tuple[list[float | None], list[float]]:
        """Asks for verdicts.

        Returns:
            B scores, None where no verdict can be read; and the share of missing verdicts of each response.
        """

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """See `Reward.score`; the status is ignored."""
        return self.score_parts(prompts, responses, statuses)[0]

    def score_parts(
        self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the scores, missing ones replaced, and the share of missing verdicts.

        Raises:
            UserError: The endpoint is lost, or no verdict of a larger batch can be read.
        """
        scores, unparsed = self.judge(prompts, responses)
        by_prompt: defaultdict[int, list[float]] = defaultdict(list)
        for prompt, score in zip(prompts, scores, strict=True):
            if score is not None:
                by_prompt[prompt.index].append(score)
        filled = [
            score if score is not None else mean(by_prompt[prompt.index], self.middle)
            for prompt, score in zip(prompts, scores, strict=True)
        ]
        total = torch.tensor(filled, dtype=torch.float32)
        return total, {self.name: total, f"{self.name}_unparsed": torch.tensor(unparsed, dtype=torch.float32)}

    def question(self, text: str, sample: int = 0) -> Call:
        """A request with one user turn."""
        messages = [Message(role="user", content=text)]
        return chat_call(
            self.endpoints[0], messages, temperature=self.temperature, max_tokens=self.max_tokens, sample=sample
        )

    def verdicts(self, calls: Sequence[Call], read: Callable[[int, str], Verdict | None]) -> list[Verdict | None]:
        """The verdict in the answer to each call, None where none can be read in `attempts` answers.

        Args:
            calls: N questions.
            read: Called with the number of a question, from 0, and the text of an answer; returns its verdict or None.

        Raises:
            UserError: The endpoint is lost, or none of many verdicts can be read.
        """
        found: list[Verdict | None] = [None] * len(calls)
        missing, text = list(range(len(calls))), ""
        for attempt in range(self.attempts):
            asked = [calls[i].repeat(attempt) for i in missing]
            for i, answer in zip(missing, self.answers(asked), strict=True):
                text, complete = self._text(answer)
                found[i] = read(i, text) if complete else None
            missing = [i for i in missing if found[i] is None]
            if not missing:
                return found
        if len(missing) == len(calls) >= MANY:
            end = " ".join(text.split())[-80:]
            raise UserError(
                f"reward {self.name!r}: none of {len(calls):,} verdicts of {self._model} can be read, one answer ends "
                f"with {end!r}; change template or max_tokens, and {self.resume}."
            )
        return found

    @property
    def _model(self) -> str:
        return self.endpoints[0].model or self.endpoints[0].base_url

    def _text(self, answer: dict[str, Any]) -> tuple[str, bool]:
        """The text of an answer, and whether it ended by itself."""
        try:
            message = ChatAnswer.from_json(answer)
        except ValueError as error:
            raise UserError(f"reward {self.name!r}: {error}; check base_url of the endpoint.") from error
        return message.text, message.finish in ("stop", "")


def last_line(text: str) -> str:
    """The last line of a text that is not empty, without the asterisks of bold type."""
    lines = text.strip().splitlines()
    return lines[-1].replace("*", "").strip() if lines else ""


def number_at_end(text: str, label: str) -> float | None:
    """The number in a last line `label: number`; None if that line is anything else."""
    match = re.fullmatch(rf"{label}: *(-?[0-9]+(?:\.[0-9]+)?)", last_line(text), re.IGNORECASE)
    return float(match[1]) if match else None


def word_at_end(text: str, label: str, words: Sequence[str]) -> str | None:
    """The word in a last line `label: word`, in lower case; None if that line is anything else."""
    match = re.fullmatch(rf"{label}: *({'|'.join(words)})\.?", last_line(text), re.IGNORECASE)
    return match[1].lower() if match else None


def mean(values: Sequence[float], default: float) -> float:
    """The mean, or `default` of no values."""
    return sum(values) / len(values) if values else default
