"""Validation of the conversations in a dataset: the content of each turn and the order of turns.

A `ValueError` describes what is wrong with a cell; `rlmt.data.tables.parse_rows` adds the file and the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from rlmt.errors import UserError
from rlmt.types import Message

_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{.*\}\s*\]\s*""", re.DOTALL)
_KEYS = [re.compile(rf"""["']{key}["']\s*:""") for key in ("role", "content")]


def decode_messages(cell: object) -> object:
    """Decodes a cell that holds a list of messages as JSON text, as CSV files and databases do.

    Args:
        cell: Cell of a column for prompts or conversations.

    Returns:
        The list of messages; any other cell, other text included, unchanged.

    Raises:
        ValueError: The text is a list of messages in another notation, such as that of Python.
    """
    if not isinstance(cell, str) or not _MESSAGES_AS_TEXT.fullmatch(cell) or not all(k.search(cell) for k in _KEYS):
        return cell
    try:
        turns: object = json.loads(cell)
    except ValueError:
        raise ValueError("is a list of messages as text, but not JSON; write it with json.dumps") from None
    keys = {"role", "content"}
    return turns if all(isinstance(turn, dict) and keys <= turn.keys() for turn in turns) else cell  # type: ignore[attr-defined]


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
