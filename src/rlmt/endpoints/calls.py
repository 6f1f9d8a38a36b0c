"""Requests and the parts of their answers that rlmt uses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rlmt.endpoints.endpoint import Endpoint
from rlmt.types import Message

RETRY_TEMPERATURE = 0.7
"""Lowest temperature of repeated questions: greedy decoding would give the same unreadable answer."""

_REPEAT_STRIDE = 1000
"""Added to the sample number of a call at each repetition; above the number of samples that any caller asks for."""


@dataclass(frozen=True)
class Call:
    """One request whose answer is wanted.

    Args:
        path: Path after the endpoint's URL, such as /chat/completions.
        body: JSON body.
        sample: Distinguishes calls with the same body, such as several samples for a prompt.
    """

    path: str
    body: dict[str, Any]
    sample: int = 0

    @cached_property
    def key(self) -> str:
        """Hash of path, body and sample; without the URL, so that a server that moves keeps its recorded answers."""
        content = json.dumps([self.path, self.body, self.sample], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def repeat(self, attempt: int) -> Call:
        """The same question once more, as a call of its own; the question itself at attempt 0."""
        if attempt == 0:
            return self
        body = dict(self.body)
        if "temperature" in body:
            body["temperature"] = max(body["temperature"], RETRY_TEMPERATURE)
        return replace(self, body=body, sample=self.sample + attempt * _REPEAT_STRIDE)


def chat_call(
    endpoint: Endpoint,
    messages: Sequence[Message],
    *,
    temperature: float,
    max_tokens: int,
    sample: int = 0,
    **fields: Any,
) -> Call:
    """A chat completion.

    Args:
        endpoint: Endpoint; its model and options become part of the body.
        messages: Conversation.
        temperature: Sampling temperature.
        max_tokens: Maximum length of the answer in tokens, hidden thinking included.
        sample: Number of the sample.
        **fields: Further fields of the body.
    """
    body = {"model": endpoint.model, "messages": list(messages), "temperature": temperature, "max_tokens": max_tokens}
    body |= fields | (endpoint.options or {})
    return Call("/chat/completions", {name: value for name, value in body.items() if value is not None}, sample)


@dataclass(frozen=True)
class ChatAnswer:
    """The first choice of a chat completion."""

    text: str
    """The message; hidden reasoning, which some servers return in fields of its own, is not part of it."""
    finish: str
    """Finish reason: stop, length, content_filter or another one."""

    @classmethod
    def from_json(cls, answer: Mapping[str, Any]) -> ChatAnswer:
        """Reads an answer.

        Args:
            answer: JSON of the answer.

        Raises:
            ValueError: It is not a chat completion.
        """
        try:
            choice = answer["choices"][0]
            text, finish = choice["message"].get("content"), choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError("the answer is not a chat completion") from error
        if not isinstance(text, str | None) or not isinstance(finish, str | None):
            raise ValueError("the answer's text or finish reason is not text")
        return cls(text or "", finish or "")


@dataclass(frozen=True)
class Usage:
    """Billed tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def from_json(cls, answer: Mapping[str, Any]) -> Usage:
        """The tokens that an answer reports; 0 if it reports none.

        Some endpoints (Gemini's) count hidden thinking in the total only, so the completion is what the total has more
        than the prompt.
        """
        usage = answer.get("usage")
        if not isinstance(usage, Mapping):
            return cls()
        prompt, completion, total = (
            value if isinstance(value := usage.get(name), int) and value > 0 else 0
            for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        )
        return cls(prompt, max(completion, total - prompt))

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens)
