"""What rendering and decoding need of a tokenizer: control strings, plain text without them, chat template, BOS.

They are apart from `rlmt.formats.thinking` because they know nothing of thoughts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rlmt.errors import UserError
from rlmt.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>")
"""Tokens that end a turn in common chat templates; a base model's tokenizer often names another as its eos token."""

_MARK, _MARK_END = "\ue000", "\ue001"
"""Private-use characters around the number of a control string that `shield` took out of a message."""


def control_strings(tokenizer: PreTrainedTokenizerBase, tags: Sequence[str]) -> dict[str, int]:
    """Special tokens and their ids, except those that spell a tag of the format."""
    named = set(tokenizer.all_special_tokens)
    return {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if (token.special or token.content in named) and not any(tag in token.content for tag in tags)
    }


def shield(messages: Sequence[Message], control: Mapping[str, int]) -> tuple[list[Message], list[str]]:
    """Replace control strings in the messages by numbered marks, so that a template's own ones can be told from them.

    Returns:
        Messages with marks, and the string behind each mark's number. A mark typed by a user is itself replaced.
    """
    literals: list[str] = []

    def mark(match: re.Match[str]) -> str:
        literals.append(match.group())
        return f"{_MARK}{len(literals) - 1}{_MARK_END}"

    longest_first = sorted(filter(None, control), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, [*longest_first, _MARK])))
    return [Message(role=m["role"], content=pattern.sub(mark, m["content"])) for m in messages], literals


def chat_text(turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template's text up to where the assistant's turn begins.

    Raises:
        UserError: The template refuses the turns.
    """
    from jinja2 import TemplateError

    plain = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        reason = " ".join(str(error).split())
        raise UserError(f"the chat template refuses turns {roles} ({reason}): use roles that it knows") from error


def turn_end(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int], plain: bool) -> list[int]:
    """The token that ends an assistant's turn in training data: one that the policy's samples stop at.

    Args:
        tokenizer: The policy's tokenizer.
        stop_token_ids: Ids that end a sample, the eos token first.
        plain: Whether prompts are plain text, so that no chat template says how a turn ends.

    Returns:
        The first stop token that the chat template writes behind an assistant's turn, else the eos token; empty for a
        tokenizer with neither.
    """
    if not plain:
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        text = str(tokenizer.apply_chat_template(probe, tokenize=False))
        after = tokenizer(text.rpartition(_MARK)[2], add_special_tokens=False)["input_ids"]
        if ends := [token for token in after if token in stop_token_ids]:
            return ends[:1]
    return list(stop_token_ids[:1])


def encode(text: str, literals: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode `text` without BOS or EOS, each mark in it as the plain characters of its literal.

    Text without marks, which is nearly all of it, is encoded in one go as in training; marks cut it into pieces.
    """
    ids: list[int] = []
    for position, piece in enumerate(re.split(f"{_MARK}(\\d+){_MARK_END}", text)):
        typed = position % 2 == 1
        piece = literals[int(piece)] if typed else piece
        if piece:
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=typed)["input_ids"]
    return ids


def one_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Make the prompt start with exactly one BOS if a template or the post-processor starts with one.

    Later BOS tokens are left alone: some templates open every turn with that token.
    """
    bos = tokenizer.bos_token_id
    start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    adds = tokenizer("")["input_ids"][:1] == [bos]
    return ids[start:] if bos is None or not (start or adds) else [int(bos), *ids[start:]]
