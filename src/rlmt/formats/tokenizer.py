"""Tokenizer helpers for rendering and decoding: control strings and BOS.

They are separate from `rlmt.formats.thinking` because they do not depend on the thinking format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rlmt.annotations import PreTrainedTokenizerBase
from rlmt.types import Message

_MARK, _MARK_END = "\ue000", "\ue001"
"""Private-use characters around the number of a control string that `shield` replaced."""


def control_strings(tokenizer: PreTrainedTokenizerBase, tags: Sequence[str]) -> dict[str, int]:
    """Special tokens and their ids, except those that contain a tag of the format."""
    named = set(tokenizer.all_special_tokens)
    return {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if (token.special or token.content in named) and not any(tag in token.content for tag in tags)
    }


def shield(messages: Sequence[Message], control: Mapping[str, int]) -> tuple[list[Message], list[str]]:
    """Replaces control strings in messages by numbered marks, to distinguish them from those of the chat template.

    Args:
        messages: Turns, oldest first.
        control: Control strings and their ids.

    Returns:
        Messages with marks, and the replaced string of each mark number. A mark typed by a user is replaced, too.
    """
    literals: list[str] = []

    def mark(match: re.Match[str]) -> str:
        literals.append(match.group())
        return f"{_MARK}{len(literals) - 1}{_MARK_END}"

    longest_first = sorted(filter(None, control), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, [*longest_first, _MARK])))
    return [Message(role=m["role"], content=pattern.sub(mark, m["content"])) for m in messages], literals


def encode(text: str, literals: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encodes text without BOS or EOS; each mark is encoded as the plain characters of its control string.

    Text without marks, the usual case, is encoded in one call, as in training. Marks split it into pieces.

    Args:
        text: Text with marks from `shield`.
        literals: Control string of each mark number.
        tokenizer: The policy's tokenizer.

    Returns:
        Token ids.
    """
    ids: list[int] = []
    for position, piece in enumerate(re.split(f"{_MARK}(\\d+){_MARK_END}", text)):
        typed = position % 2 == 1
        piece = literals[int(piece)] if typed else piece
        if piece:
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=typed)["input_ids"]
    return ids


def one_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Makes a prompt start with exactly one BOS if the template or the post-processor adds one.

    Later BOS tokens are unchanged: some templates start every turn with that token.

    Args:
        ids: Token ids of the prompt.
        tokenizer: The policy's tokenizer.

    Returns:
        Token ids with at most one leading BOS.
    """
    bos = tokenizer.bos_token_id
    start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    adds = tokenizer("")["input_ids"][:1] == [bos]
    return ids[start:] if bos is None or not (start or adds) else [int(bos), *ids[start:]]
