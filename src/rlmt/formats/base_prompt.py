"""Plain-text prompts for base models, which have no chat template."""

from __future__ import annotations

from collections.abc import Sequence

from rlmt.errors import UserError
from rlmt.types import Message

_PREAMBLE = "What follows is a conversation between a user and a helpful assistant. "
_THINK = (
    "Before every answer the assistant works out what the user needs and how best to reply; it writes these thoughts "
    "first, between <think> and </think>, and the user does not see them. It then writes the answer that the user "
    "reads between <response> and </response>."
)
_NO_THINK = "The assistant writes the answer that the user reads between <response> and </response>."


def base_prompt(messages: Sequence[Message], thinks: bool, opening: str) -> str:
    """The plain-text prompt of a base model: preamble, system text, turns, and the start of the assistant turn.

    Args:
        messages: Turns, oldest first.
        thinks: Whether the preamble requests a thought.
        opening: Tag that the prompt ends with, or "".

    Returns:
        The prompt text.

    Raises:
        UserError: A role is unknown.
    """
    head = [_PREAMBLE + (_THINK if thinks else _NO_THINK)]
    turns: list[str] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            head.append(content)
        elif role == "user":
            turns.append(f"User: <query>{content}</query>")
        elif role == "assistant":
            # Past turns show what the user saw: the response without its thought.
            turns.append(f"Assistant: <response> {content} </response>")
        else:
            raise UserError(f"the prompt has a turn with role {role!r}; use system, user or assistant.")
    return "\n\n".join(head) + "\n\n" + "\n".join([*turns, f"Assistant: {opening}".rstrip()])
