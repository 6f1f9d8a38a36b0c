"""Chat templates: rendering on a fixed day, and facts about a template that only a rendered conversation shows.

Where a turn ends, what opens the assistant's turn, whether that opens a thought and which argument switches thoughts on
is written nowhere but in the template's code. A short conversation is rendered for each of them. Left out: tools,
documents and images.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from rlmt.annotations import PreTrainedTokenizerBase
from rlmt.errors import UserError
from rlmt.formats.tokenizer import control_strings
from rlmt.types import Message

TEMPLATE_DATE = "2024-07-26"
"""Day that chat templates print unless another one is set. Today's would make a run that is resumed tomorrow another
run. It is the one that Llama 3 templates print without a clock."""

THINKING_SWITCHES = ("enable_thinking", "thinking")
"""Arguments that switch thoughts on or off in common chat templates."""

THOUGHT_TAGS = ("<think>", "</think>")
"""Tags around a thought, in the formats and in chat templates."""

_USER, _ANSWER = "\ue002", "\ue003"
"""Private-use characters that stand for the text of a turn, so that no text of a template equals them."""
_THOUGHT = re.compile(rf"(?:{THOUGHT_TAGS[0]}\s*)?(?:{THOUGHT_TAGS[1]}\s*)?")
"""A thought without text, possibly not closed or not opened."""
_OWN_ARGUMENTS = ("tools", "documents")
"""Parameters of `apply_chat_template` that are arguments of the template."""


def check_has_template(tokenizer: PreTrainedTokenizerBase, source: str, purpose: str, fix: str) -> None:
    """Checks that a tokenizer has one chat template to use.

    Args:
        tokenizer: The tokenizer.
        source: Its folder or hub name, for the message.
        purpose: What the template is for, as the end of a sentence.
        fix: What to do if there is none.

    Raises:
        UserError: There is none, or there are several with names and none is named default.
    """
    template = tokenizer.chat_template
    if not template:
        raise UserError(f"{source}: the tokenizer has no chat template, which {purpose}; {fix}.")
    if isinstance(template, dict) and "default" not in template:
        raise UserError(
            f"{source}: the tokenizer has chat templates named {', '.join(sorted(template))} and none named default; "
            "save the one to use as chat_template.jinja and remove the others."
        )


class ChatTemplate:
    """A tokenizer's chat template with its arguments and date.

    Args:
        tokenizer: A tokenizer with a chat template.
        arguments: Arguments of the template, such as `{"enable_thinking": False}`.
        date: Day that the template prints if it prints one, YYYY-MM-DD.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None, date: str = TEMPLATE_DATE
    ) -> None:
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self.date = date
        now = datetime.fromisoformat(date)
        # Templates read the clock by strftime_now, or receive the day in Llama's notation as date_string.
        self._arguments = {"strftime_now": now.strftime, "date_string": now.strftime("%d %b %Y"), **self.arguments}

    def prompt(self, turns: Sequence[Message]) -> str:
        """Renders turns up to the start of the assistant's turn.

        Args:
            turns: Turns, oldest first.

        Raises:
            UserError: The template refuses the turns.
        """
        return self._render(turns, generation_prompt=True)

    def conversation(self, turns: Sequence[Message]) -> str:
        """Renders turns without the start of a further one.

        Args:
            turns: Turns, oldest first.

        Raises:
            UserError: The template refuses the turns.
        """
        return self._render(turns, generation_prompt=False)

    def _render(self, turns: Sequence[Message], generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        plain = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    plain, tokenize=False, add_generation_prompt=generation_prompt, **self._arguments
                )
            )
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            # The code of a template raises whatever Python raises on a value that it does not expect.
            roles = ", ".join(turn["role"] for turn in turns)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"the chat template refuses the turns {roles} ({reason}); use supported roles.") from error

    def thought(self, turns: Sequence[Message]) -> Literal["none", "open", "closed"]:
        """Whether the start of the assistant's turn opens a thought, or opens and closes one."""
        start = self.prompt(turns).rstrip()
        return "open" if start.endswith(THOUGHT_TAGS[0]) else "closed" if start.endswith(THOUGHT_TAGS[1]) else "none"

    def turn_end(self) -> int | None:
        """The special token that ends an assistant's turn: the first one behind its text.

        A template that writes nothing behind the last turn ends it with the token that opens the next one.

        Returns:
            Token id; None if other text comes first, or nothing.
        """
        control = set(control_strings(self.tokenizer, THOUGHT_TAGS).values())
        for after in self._texts_behind_answer():
            for token in self.tokenizer(after, add_special_tokens=False)["input_ids"]:
                if token in control:
                    return int(token)
                if str(self.tokenizer.decode([token])).strip():
                    break
        return None

    def _texts_behind_answer(self) -> Iterator[str]:
        """What the template writes behind an assistant's text at the end of a conversation, and before a user turn."""
        user, answer = Message(role="user", content=_USER), Message(role="assistant", content=_ANSWER)
        for turns in ([user, answer], [user, answer, user]):
            yield self.conversation(turns).rpartition(_ANSWER)[2]

    def check(self) -> None:
        """Checks that prompts continue with an answer as the template itself writes it, and that the answer has an end.

        Raises:
            UserError: The prompt is no prefix of the template's conversation of prompt and answer, the template omits
                texts, or no special token ends an assistant's turn.
        """
        user, answer = Message(role="user", content=_USER), Message(role="assistant", content=_ANSWER)
        prompt, conversation = self.prompt([user]), self.conversation([user, answer])
        if _USER not in prompt or _ANSWER not in conversation:
            raise UserError("the chat template omits the text of turns that are plain text; use a template for text.")
        # Templates may remove the thought of a past turn, or write an empty one, so a thought in the prompt counts for
        # nothing here.
        start = re.sub(rf"{_THOUGHT.pattern}\Z", "", prompt)
        before = conversation.partition(_ANSWER)[0]
        if not before.startswith(start):
            raise UserError(
                f"the chat template starts an answer with {_after_user(prompt)!r} in a prompt, but with "
                f"{_after_user(before)!r} in a conversation; correct one of them in chat_template.jinja."
            )
        if between := _THOUGHT.sub("", before[len(start) :]).strip():
            raise UserError(
                f"the chat template writes {between!r} before an answer, but not at the end of a prompt; write it if "
                "add_generation_prompt is set in chat_template.jinja."
            )
        if self.turn_end() is None:
            end = next((text.partition(_USER)[0] for text in self._texts_behind_answer() if text.strip()), "")
            raise UserError(
                f"the chat template writes {end!r} behind an answer, and no special token that could end a sample; "
                "write {{ eos_token }} there in chat_template.jinja, or add the mark to the special tokens."
            )

    def check_arguments(self) -> None:
        """Checks the arguments; no text is rendered.

        Raises:
            UserError: The template does not read an argument, or rlmt sets it itself.
        """
        template = str(self.tokenizer.get_chat_template())
        reserved = set(inspect.signature(self.tokenizer.apply_chat_template).parameters).difference(_OWN_ARGUMENTS)
        for name in self.arguments:
            if name in reserved:
                raise UserError(f"chat_template_kwargs has {name!r}, which rlmt sets itself; leave it out.")
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise UserError(f"chat_template_kwargs has {name!r}, which the chat template does not read; remove it.")

    def prints_date(self) -> bool:
        """Whether the rendered text depends on the date."""
        other = ChatTemplate(self.tokenizer, self.arguments, "2001-02-03")
        return any(self.conversation(turns) != other.conversation(turns) for turns in _conversations(self))

    def with_thinking_switch(self, on: bool) -> ChatTemplate:
        """The template with its thinking switch set, if it has one.

        Args:
            on: Whether the model is to think.

        Returns:
            A template with the switch among its arguments, unless that changes no prompt or the switch is set already.
        """
        arguments = dict(self.arguments)
        text = str(self.tokenizer.get_chat_template())
        for name in THINKING_SWITCHES:
            if name in arguments or not re.search(rf"\b{name}\b", text):
                continue
            unset, wanted, opposite = (
                _prompts(ChatTemplate(self.tokenizer, {**arguments, **setting}, self.date))
                for setting in ({}, {name: on}, {name: not on})
            )
            if wanted != opposite and wanted != unset:
                arguments[name] = on
        return ChatTemplate(self.tokenizer, arguments, self.date)


def _after_user(text: str) -> str:
    """What a rendered conversation has behind the user's text."""
    return text.rpartition(_USER)[2]


def _conversations(template: ChatTemplate) -> Iterator[list[Message]]:
    """Prompts of the kinds that templates treat differently; the one with a system turn only where it is supported."""
    user, answer = Message(role="user", content=_USER), Message(role="assistant", content=_ANSWER)
    system = Message(role="system", content="a")
    for turns in ([user], [user, answer, user], [system, user]):
        try:
            template.prompt(turns)
        except UserError:
            continue
        yield turns


def _prompts(template: ChatTemplate) -> list[str]:
    """The rendered prompts of `_conversations`."""
    return [template.prompt(turns) for turns in _conversations(template)]
