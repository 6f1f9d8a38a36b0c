"""Encoding of conversations for a reward model: its chat template and tokenizer, one BOS, no injected control tokens.

A policy can write a special token of the reward model, such as `<|eot_id|>`, as text in its response. Tokenized
unchanged, it would end the assistant turn, and the policy could append a second, flattering conversation. So the
strings of special tokens are removed from every text before the template is applied.
"""

from __future__ import annotations

import os.path
import re

import jinja2
from transformers import PreTrainedTokenizerBase

from rlmt.errors import UserError, first_line
from rlmt.types import Message

TEMPLATE_DATE = "26 Jul 2024"
"""Date passed to Llama 3 templates. They print today's date by default, so scores would change in a resumed run."""


class ConversationReader:
    """Renders conversations with a tokenizer's chat template and encodes them with exactly one BOS.

    Args:
        tokenizer: A tokenizer with a chat template.
        source: Its folder or Hub name, for messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self._adds_bos = self._ids(["a"], add_special_tokens=True)[0][:1] == [tokenizer.bos_token_id]
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special.update(tokenizer.all_special_tokens)
        alternatives = sorted((re.escape(token) for token in special if token), key=len, reverse=True)
        self._special = re.compile("|".join(alternatives)) if alternatives else None
        # Two conversations that differ only in the response share exactly the suffix that closes the turn.
        probes = self.encode([self.render([{"role": "user", "content": "a"}], text) for text in ("x", "y")])
        self.suffix_length = len(os.path.commonprefix([row[::-1] for row in probes]))
        """Number of tokens that the template writes after the response."""

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
        clean = [{"role": turn["role"], "content": self.neutralise(turn["content"])} for turn in turns]
        try:
            text = self.tokenizer.apply_chat_template(clean, tokenize=False, date_string=TEMPLATE_DATE)
        except jinja2.TemplateError as error:
            roles = ", ".join(turn["role"] for turn in clean)
            raise UserError(
                f"the chat template of reward model {self.source!r} refuses a conversation with the turns {roles}: "
                f"{first_line(error)}; change the prompts or the reward model."
            ) from error
        return str(text)

    def neutralise(self, text: str) -> str:
        """Removes the strings of special tokens, which would be encoded as control tokens.

        Repeats until none is left, since removing one can create another: `<|eo<|eot_id|>t_id|>`.
        """
        while self._special is not None:
            clean = self._special.sub("", text)
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
