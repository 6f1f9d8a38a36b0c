"""What is asked of the teacher, and which of its answers become demonstrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlmt.data.messages import text_problem
from rlmt.endpoints import Call, ChatAnswer, Endpoint, Ledger, chat_call
from rlmt.formats.thinking import ThinkingFormat
from rlmt.types import Message, Prompt

_FORMAT = ThinkingFormat("think")
_TAGS = ThinkingFormat("zero_think").tags
"""The tags of all formats: a demonstration contains none of them, so that every format can write it."""


@dataclass(frozen=True)
class Attempt:
    """An answer of the teacher."""

    reason: str
    """Why it was rejected, in one word; empty if it was accepted."""
    text: str = ""
    """The answer, or the endpoint's message if it refused the request."""
    thought: str = ""
    """Thought of an accepted answer."""
    response: str = ""
    """Response of an accepted answer."""


@dataclass(frozen=True)
class Row:
    """A prompt with the answers to it; the last one is accepted, or all tries are used up."""

    prompt: Prompt
    attempts: list[Attempt]

    @property
    def accepted(self) -> bool:
        """Whether the row is a demonstration."""
        return not self.attempts[-1].reason

    def to_json(self) -> dict[str, Any]:
        """The row of the file of demonstrations, or of the file of rejected prompts."""
        row: dict[str, Any] = {"index": self.prompt.index, "prompt": self.prompt.messages}
        if self.accepted:
            return row | {"thought": self.attempts[-1].thought, "response": self.attempts[-1].response}
        attempts = [{"reason": attempt.reason, "text": attempt.text} for attempt in self.attempts]
        return row | {"reason": self.attempts[-1].reason, "attempts": attempts}


@dataclass(frozen=True)
class Question:
    """How the teacher is asked."""

    endpoint: Endpoint
    instruction: str
    """Text after the last user turn."""
    temperature: float
    """Sampling temperature."""
    max_tokens: int
    """Maximum length of an answer in tokens."""
    tries: int
    """Maximum number of answers per prompt."""

    def messages(self, prompt: Prompt) -> list[Message]:
        """The conversation of a prompt with the instruction."""
        *before, last = prompt.messages
        return [*before, Message(role=last["role"], content=f"{last['content']}\n\n{self.instruction}")]

    def call(self, prompt: Prompt, number: int) -> Call:
        """The request for an answer; `number` counts from 0."""
        options = {"temperature": self.temperature, "max_tokens": self.max_tokens, "sample": number}
        return chat_call(self.endpoint, self.messages(prompt), **options)  # type: ignore[arg-type]

    def recorded(self, prompt: Prompt, ledger: Ledger) -> Row | None:
        """The row of a prompt if the ledger has all answers that it needs."""
        attempts: list[Attempt] = []
        for number in range(self.tries):
            answer = ledger.get(self.call(prompt, number).key)
            if answer is None:
                return None
            attempts.append(check_answer(answer))
            if not attempts[-1].reason:
                break
        return Row(prompt, attempts)


def check_answer(answer: Mapping[str, Any]) -> Attempt:
    """Accepts an answer that ended by itself and that every thinking format can write.

    Args:
        answer: JSON of a chat completion.

    Returns:
        The attempt, with thought and response or with the reason for its rejection: `malformed` (no chat completion),
        `truncated` (at the length limit), `finish_…` (another finish reason than `stop`), `empty`, `not_text` (with a
        lone surrogate), a status of `ThinkingFormat.split`, `tag_inside` (a tag within thought or response), or
        `empty_thought`.
    """
    try:
        chat = ChatAnswer.from_json(answer)
    except ValueError:
        return Attempt("malformed")
    split = _FORMAT.split(chat.text)
    reason = ""
    if chat.finish != "stop":
        reason = "truncated" if chat.finish == "length" else f"finish_{chat.finish or 'missing'}"
    elif text_problem(chat.text):
        reason = "not_text" if chat.text.strip() else "empty"
    elif not split.ok:
        reason = str(split.status)
    elif any(tag in split.thought or tag in split.response for tag in _TAGS):
        reason = "tag_inside"
    elif not split.thought:
        reason = "empty_thought"
    return Attempt(reason, chat.text) if reason else Attempt("", chat.text, split.thought, split.response)


def distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompt of each conversation: the same request has the same answer."""
    found: dict[tuple[tuple[str, str], ...], Prompt] = {}
    for prompt in prompts:
        found.setdefault(tuple((turn["role"], turn["content"]) for turn in prompt.messages), prompt)
    return list(found.values())
