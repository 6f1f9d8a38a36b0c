"""Encoding of conversations for a reward model: its chat template and tokenizer, one BOS, no injected control tokens.

A policy can write a special token of the reward model, such as `<|eot_id|>`, as text in its response. Tokenized
unchanged, it would end the assistant turn, and the policy could append a second, flattering conversation. So the
strings of special tokens are replaced by a space in every text before the template is applied. Without the space, parts
of a tag on both sides of such a string would become a tag: `<th<|eot_id|>ink>`.
"""

from __future__ import annotations

import itertools
import os.path
import re
from typing import cast

from rlmt.annotations import PretrainedConfig, PreTrainedTokenizerBase
from rlmt.errors import UserError
from rlmt.formats.chat_template import TEMPLATE_DATE, ChatTemplate
from rlmt.types import Message

_PROBE = [Message(role="user", content="a")]


class ConversationReader:
    """Renders conversations with a tokenizer's chat template and encodes them with exactly one BOS.

    Args:
        tokenizer: A tokenizer with a chat template.
        source: Its folder or Hub name, for messages.
        date: Day that the chat template prints if it prints one, YYYY-MM-DD.

    Raises:
        UserError: The template refuses conversations or omits responses, or the tokenizer encodes all of them alike.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, date: str = TEMPLATE_DATE) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self._template = ChatTemplate(tokenizer, date=date)
        self._adds_bos = self._ids(["a"], add_special_tokens=True)[0][:1] == [tokenizer.bos_token_id]
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special.update(tokenizer.all_special_tokens)
        alternatives = sorted((re.escape(token) for token in special if token), key=len, reverse=True)
        self._special = re.compile("|".join(alternatives)) if alternatives else None
        # Two conversations that differ only in the response share exactly the suffix that closes the turn.
        self.suffix_length = len(os.path.commonprefix([row[::-1] for row in self._probes()]))
        """Number of tokens that the template writes after the response."""

    def _probes(self) -> tuple[list[int], list[int]]:
        """Two encoded conversations that differ only in the response.

        A tokenizer of whole words encodes letters that are no words alike, so its own words are tried, too.
        """
        first, second = (self.render(_PROBE, response) for response in ("x", "y"))
        if first == second:
            raise UserError(
                f"reward model {self.source!r}: the chat template omits the response; use one for plain text."
            )
        row = self.encode([first])[0]
        words = (str(self.tokenizer.decode([token])).strip() for token in range(len(self.tokenizer)))
        for text in itertools.chain([second], (self.render(_PROBE, word) for word in words)):
            if (other := self.encode([text])[0]) != row:
                return row, other
        raise UserError(f"reward model {self.source!r}: its tokenizer encodes all responses alike; use another one.")

    def render(self, messages: list[Message], response: str) -> str:
        """Renders `messages`, followed by `response` as the assistant turn.

        Args:
            messages: The conversation before the response.
            response: The response text.

        Returns:
            The text that `encode` reads.

        Raises:
            UserError: The chat template refuses the conversation; some refuse system turns.
        """
        turns = [*messages, Message(role="assistant", content=response)]
        try:
            return self._template.conversation(
                [Message(role=turn["role"], content=self.neutralise(turn["content"])) for turn in turns]
            )
        except UserError as error:
            raise UserError(f"reward model {self.source!r}: {error}") from error

    def neutralise(self, text: str) -> str:
        """Replaces the strings of special tokens, which would be encoded as control tokens, by a space.

        Repeats until none is left: the space can complete a special token that contains one.
        """
        while self._special is not None:
            clean = self._special.sub(" ", text)
            if clean == text:
                break
            text = clean
        return text

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Encodes rendered conversations.

        Each row starts with one BOS if the template writes one or the tokenizer normally adds one. It ends with the
        last token of the template, without an EOS that the tokenizer would append to plain text.

        Args:
            texts: Rendered conversations.

        Returns:
            One list of token ids per conversation.
        """
        rows = []
        for row in self._ids(texts, add_special_tokens=False):
            needs_bos = self._adds_bos and self.leading_bos(row) == 0
            while self.leading_bos(row[1:]) and self.leading_bos(row):
                row = row[1:]
            rows.append([self.tokenizer.bos_token_id, *row] if needs_bos else row)
        return rows

    def leading_bos(self, row: list[int]) -> int:
        """The number of leading BOS tokens to keep: 1 if `row` starts with a BOS, else 0."""
        return int(row[:1] == [self.tokenizer.bos_token_id])

    def _ids(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        rows: list[list[int]] = self.tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return rows


def set_pad_token(reader: ConversationReader, config: PretrainedConfig) -> None:
    """Sets the pad token of a reward model to one that no conversation ends with, in its tokenizer and its config.

    Hugging Face's `...ForSequenceClassification` reads the score at the rightmost token that is not the pad token. If
    the pad token ended a turn, it would read the score a token early. A tokenizer whose only special token ends the
    turn gets no pad token: conversations are then scored one by one.

    Args:
        reader: Renders conversations with the reward model's tokenizer.
        config: Config of the reward model.
    """
    tokenizer, rows = reader.tokenizer, config.get_text_config().vocab_size
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    # Tokens made for padding first, such as <|finetune_right_pad_id|>; the sort is stable.
    names.sort(key=lambda name: (name != tokenizer.pad_token, "pad" not in name.lower()))
    ends = {row[-1] for row in reader.encode([reader.render(_PROBE, text) for text in ("x", "y", "")])}
    ids = {name: cast(int, tokenizer.convert_tokens_to_ids(name)) for name in names}
    free = [(name, number) for name, number in ids.items() if number not in ends and number < rows]
    tokenizer.pad_token, pad_id = free[0] if free else (None, None)
    config.pad_token_id = config.get_text_config().pad_token_id = pad_id
