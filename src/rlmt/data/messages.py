"""Conversations as they stand in a data set: what a turn may be, and in which order turns may come.

A `ValueError` says in a few words what is wrong with a cell; `rlmt.data.tables.parse_rows` adds the file and the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlmt.errors import UserError
from rlmt.types import Message


def to_conversation(turns: Sequence[object]) -> list[Message]:
    """The turns of a cell as messages; other keys than role and content are left out."""
    return [_to_message(turn, number) for number, turn in enumerate(turns, start=1)]


def check_turns(messages: Sequence[Message]) -> None:
    """Raises ValueError unless user and assistant take turns, the user first, behind an optional system turn."""
    has_system = bool(messages) and messages[0]["role"] == "system"
    turns = messages[has_system:]
    if not turns:
        raise ValueError("no user turn")
    for number, turn in enumerate(turns, start=1 + has_system):
        expected = "user" if (number - has_system) % 2 else "assistant"
        if turn["role"] != expected:
            raise ValueError(f"turn {number} has role {turn['role']!r} where {expected!r} must stand")


def check_system(system: str | None) -> None:
    """Raises UserError where `--data.system` is given and is no text."""
    if system is not None and (problem := text_problem(system)):
        raise UserError(f"--data.system {problem}: leave it out or give it text")


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The conversation with a system turn first, if one is given and there is none."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [Message(role="system", content=system), *messages]


def text_problem(text: object) -> str:
    """What keeps a text from being a turn, or "" if nothing does."""
    if not isinstance(text, str):
        return f"is {type_name(text)}, not text"
    if not text.strip():
        return "is empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds a lone surrogate, which no tokenizer can encode"
    return ""


def type_name(value: object) -> str:
    """What a cell is, in words."""
    return "missing" if value is None else f"of type {type(value).__name__}"


def _to_message(turn: object, number: int) -> Message:
    if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
        raise ValueError(f"turn {number} is not a message with `role` and `content`")
    if problem := text_problem(turn["content"]):
        raise ValueError(f"turn {number} {problem}")
    return Message(role=str(turn["role"]), content=turn["content"])
