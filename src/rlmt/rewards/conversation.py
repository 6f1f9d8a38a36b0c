"""How a reward model reads a conversation: its own template and tokenizer, one BOS, no smuggled control tokens.

A policy can spell out a special token of the reward model, such as `<|eot_id|>`, in its response. Tokenized as it
stands that would close the assistant's turn, and the policy could write a second, flattering conversation behind it.
So the literal strings of special tokens are taken out of every text before the template is applied.
"""

from __future__ import annotations

import os.path
import re

import jinja2
from transformers import PreTrainedTokenizerBase

from rlmt.errors import UserError, first_line
from rlmt.types import Message

TEMPLATE_DATE = "26 Jul 2024"
"""The date that Llama 3 templates are given: they would else print today's, and a resumed run would be scored anew."""


class ConversationReader:
    """Writes a conversation out with one tokenizer's chat template, and turns it into tokens with exactly one BOS.

    Args:
        tokenizer: A tokenizer with a chat template.
        source: Where it came from, for error messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self._adds_bos = self._ids(["a"], add_special_tokens=True)[0][:1] == [tokenizer.bos_token_id]
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special.update(tokenizer.all_special_tokens)
        alternatives = sorted((re.escape(token) for token in special if token), key=len, reverse=True)
        self._special = re.compile("|".join(alternatives)) if alternatives else None
        # Two conversations that differ only in the response end alike exactly where the template closes the turn.
        probes = self.encode([self.render([{"role": "user", "content": "a"}], text) for text in ("x", "y")])
        self.suffix_length = len(os.path.commonprefix([row[::-1] for row in probes]))
        """How many tokens the template writes after the response."""

    def render(self, messages: list[Message], response: str) -> str:
        """The text that the tokenizer reads: `messages`, then `response` as the assistant's turn.

        Raises:
            UserError: The chat template refuses the conversation, as some do where there is a system turn.
        """
        turns = [*messages, Message(role="assistant", content=response)]
        clean = [{"role": turn["role"], "content": self.neutralise(turn["content"])} for turn in turns]
        try:
            text = self.tokenizer.apply_chat_template(clean, tokenize=False, date_string=TEMPLATE_DATE)
        except jinja2.TemplateError as error:
            roles = ", ".join(turn["role"] for turn in clean)
            raise UserError(
                f"the chat template of reward model {self.source!r} refuses a conversation with the turns {roles}: "
                f"{first_line(error)}; change the prompts or the reward model"
            ) from error
        return str(text)

    def neutralise(self, text: str) -> str:
        """`text` without the literal strings of special tokens, which would be read as control tokens.

        Repeats until none is left, since removing one may join the ends of another: `<|eo<|eot_id|>t_id|>`.
        """
        while self._special is not None:
            clean = self._special.sub("", text)
            if clean == text:
                break
            text = clean
        return text

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of rendered conversations.

        Each starts with one BOS if the template writes any or the tokenizer normally adds one, and ends with the
        template's last token: an EOS that the tokenizer would append to plain text is not wanted there.
        """
        rows = []
        for row in self._ids(texts, add_special_tokens=False):
            extra = self._adds_bos and self.leading_bos(row) == 0
            while self.leading_bos(row[1:]) and self.leading_bos(row):
                row = row[1:]
            rows.append([self.tokenizer.bos_token_id, *row] if extra else row)
        return rows

    def leading_bos(self, row: list[int]) -> int:
        """1 if `row` starts with a BOS, else 0."""
        return int(row[:1] == [self.tokenizer.bos_token_id])

    def _ids(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        rows: list[list[int]] = self.tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return rows
