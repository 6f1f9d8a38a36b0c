"""Validation of the conversations in a dataset: the content of each turn and the order of turns.

A `ValueError` describes what is wrong with a cell; `rlmt.data.tables.parse_rows` adds the file and the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlmt.errors import UserError
from rlmt.types import Message


def to_conversation(turns: Sequence[object]) -> list[Message]:
    """Converts the turns of a cell to messages; keys other than role and content are dropped."""
    return [_to_message(turn, number) for number, turn in enumerate(turns, start=1)]


def check_turns(messages: Sequence[Message]) -> None:
    """Raises ValueError unless user and assistant alternate, user first, after an optional system turn."""
    has_system = bool(messages) and messages[0]["role"] == "system"
    turns = messages[has_system:]
    if not turns:
        raise ValueError("no user turn")
    for number, turn in enumerate(turns, start=1 + has_system):
        expected = "user" if (number - has_system) % 2 else "assistant"
        if turn["role"] != expected:
            raise ValueError(f"turn {number} has role {turn['role']!r}, expected {expected!r}")


def check_system(system: str | None) -> None:
    """Raises UserError if `--data.system` is set to something that is not text."""
    if system is not None and (problem := text_problem(system)):
        raise UserError(f"--data.system {problem}; set it to text or leave it out.")


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """Adds a system turn to a conversation that has none; None adds nothing."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [Message(role="system", content=system), *messages]


def text_problem(text: object) -> str:
    """Why a value cannot be the content of a turn, or "" if it can."""
    if not isinstance(text, str):
        return f"is {type_name(text)}, not text"
    if not text.strip():
        return "is empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "contains a lone surrogate, which no tokenizer can encode"
    return ""


def type_name(value: object) -> str:
    """The type of a cell, for messages."""
    return "missing" if value is None else f"of type {type(value).__name__}"


def _to_message(turn: object, number: int) -> Message:
    if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
        raise ValueError(f"turn {number} is not a message with `role` and `content`")
    if problem := text_problem(turn["content"]):
        raise ValueError(f"turn {number} {problem}")
    return Message(role=str(turn["role"]), content=turn["content"])
