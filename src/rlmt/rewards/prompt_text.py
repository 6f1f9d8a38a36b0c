"""Conversations and templates as text for models that are asked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from rlmt.errors import UserError
from rlmt.types import Message, Prompt

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def conversation_text(messages: Sequence[Message]) -> str:
    """A conversation as text: a single user turn as it is, else every turn after its role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def placeholders(template: str) -> set[str]:
    """Names in braces in a template; braces around anything else than a name are text."""
    return set(_PLACEHOLDER.findall(template))


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replaces `{name}` by its value, all names in one pass: a value that contains a name in braces stays as it is."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def fill_template(template: str, prompt: Prompt, values: Mapping[str, str], reward: str) -> str:
    """Replaces `{name}` by a value, by the conversation for `{prompt}`, and else by the prompt's column of that name.

    All names are replaced in one pass, so that a value that contains a name in braces stays as it is.

    Args:
        template: Template.
        prompt: Prompt with its columns.
        values: Values that take precedence over columns, such as the response.
        reward: Name of the reward, for messages.

    Raises:
        UserError: The prompt has no value in that column.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name in values:
            return values[name]
        if name == "prompt":
            return conversation_text(prompt.messages)
        return column_text(prompt, name, reward)

    return _PLACEHOLDER.sub(value, template)


def column_text(prompt: Prompt, column: str, reward: str) -> str:
    """A column of a prompt as text, JSON where it is no text.

    Raises:
        UserError: The prompt has no value in the column.
    """
    value = prompt.extra[column]
    if value is None:
        raise UserError(f"reward {reward!r}: row {prompt.index + 1} has no {column!r}; fill it in or remove the row.")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
