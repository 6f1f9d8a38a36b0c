"""The single definition of how thought and response are written and split.

SFT targets, rewards, evaluation and chat all use `ThinkingFormat`, so they agree about where a thought ends. There is
one split rule, *the first close tag*: the thought ends at the first ``</think>`` of the completion, whatever precedes
it. A response that contains a tag of the format is refused, because it could contain a second thought. A reward model
never sees any part of a refused completion.

There are four formats (RLMT, arXiv 2509.20357). `think` and `no_think` use the tokenizer's chat template and differ
only in the split and the target. `zero_think` and `zero_no_think` are for base models without a chat template, which
read the format from a plain-text preamble.

Tags other than the paper's are not supported: one spelling for all models keeps checkpoints exchangeable.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date as calendar_date
from pathlib import Path
from typing import Any, Literal, get_args

from rlmt.annotations import PreTrainedTokenizerBase
from rlmt.errors import UserError
from rlmt.formats.base_prompt import base_prompt
from rlmt.formats.chat_template import TEMPLATE_DATE, THOUGHT_TAGS, ChatTemplate
from rlmt.formats.tokenizer import control_strings, encode, one_bos, shield
from rlmt.types import Message, Split, Status

FormatName = Literal["think", "no_think", "zero_think", "zero_no_think"]

FILE_NAME = "thinking_format.json"
"""Name of the file that is saved with every checkpoint and export."""

_THINK = THOUGHT_TAGS
_RESPONSE = ("<response>", "</response>")

_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zs", "Zl", "Zp", "Mn", "Me"})
_FILLERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols, by Unicode category, that fonts draw as empty space."""


@dataclass(frozen=True)
class ThinkingFormat:
    """Renders prompts, and writes, splits and decodes completions.

    Args:
        name: `think` (chat template; thought, then response), `no_think` (chat template; response only), `zero_think`
            and `zero_no_think` (the same for base models: plain-text preamble, response in its own tags).
        prefill: Whether the prompt ends with the opening tag, so that completions start after it.
        instruction: Text appended to the system turn, which is added if the conversation has none.
        chat_template_kwargs: Arguments of the chat template, such as `{"enable_thinking": false}`. `resolve_format`
            sets the one that switches thoughts on or off, unless it is given here.
        date: Day that a chat template prints if it prints one, YYYY-MM-DD; the same for the whole run and its rewards.

    Raises:
        UserError: The name is unknown, the instruction is blank, `prefill` is set for `no_think`, which has no opening
            tag, arguments are given for a format without a chat template, or the date is none.

    Example:
        >>> ThinkingFormat().split("<think>They greet me.</think>Hello!")
        Split(thought='They greet me.', response='Hello!', status=<Status.OK: 'ok'>)
    """

    name: FormatName = "think"
    prefill: bool = False
    instruction: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    date: str = TEMPLATE_DATE

    def __post_init__(self) -> None:
        if self.name not in get_args(FormatName):
            raise UserError(f"thinking format {self.name!r} is unknown; use one of {', '.join(get_args(FormatName))}.")
        if not isinstance(self.prefill, bool):
            raise UserError(f"thinking format prefill is {self.prefill!r}; use true or false.")
        if self.prefill and self.name == "no_think":
            raise UserError("thinking format no_think has no opening tag to prefill; set prefill to false.")
        if self.instruction is not None and not (isinstance(self.instruction, str) and self.instruction.strip()):
            raise UserError(f"thinking format instruction is {self.instruction!r}; use text, or null for none.")
        if self.zero and self.chat_template_kwargs:
            raise UserError(f"thinking format {self.name} has no chat template; leave chat_template_kwargs out.")
        try:
            calendar_date.fromisoformat(self.date)
        except (TypeError, ValueError):
            raise UserError(f"thinking format date is {self.date!r}; use a day as YYYY-MM-DD.") from None

    @property
    def thinks(self) -> bool:
        """Whether completions contain a thought."""
        return self.name in ("think", "zero_think")

    @property
    def zero(self) -> bool:
        """Whether prompts are plain text for a base model, without a chat template."""
        return self.name in ("zero_think", "zero_no_think")

    @property
    def tags(self) -> tuple[str, ...]:
        """All tags of the format and its non-thinking counterpart; a response must contain none of them."""
        return _THINK + _RESPONSE if self.zero else _THINK

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a sample: text after them would be trained on but never scored."""
        return (_RESPONSE[1],) if self.zero else ()

    @property
    def opening(self) -> str:
        """The first tag of a complete target with its white space; `prefill` moves it into the prompt."""
        if self.zero:
            return _THINK[0] if self.thinks else _RESPONSE[0]
        return _THINK[0] + "\n" if self.thinks else ""

    def template(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """The tokenizer's chat template with the arguments and the date of this format."""
        return ChatTemplate(tokenizer, self.chat_template_kwargs, self.date)

    @property
    def probe(self) -> list[Message]:
        """A short prompt with the turns that every prompt of the format has."""
        return self.turns([Message(role="user", content="Hi")])

    def render(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Renders a conversation as prompt tokens.

        Control strings typed into a message (``<|im_end|>``, ``<s>``) are encoded as plain characters, so a prompt
        cannot end its own turn. Other text is unchanged, including a ``</query>`` or ``<think>`` in it: prompts are
        never parsed.

        Args:
            messages: Turns, oldest first; the last one is a user turn.
            tokenizer: The policy's tokenizer.

        Returns:
            Token ids. They start with exactly one BOS if the chat template or the post-processor adds one.

        Raises:
            UserError: The last turn is not a user turn, a role is unknown, or the template refuses the conversation.
        """
        if not messages or messages[-1]["role"] != "user":
            raise UserError("the last turn of the prompt is not a user turn; drop the row or its trailing turns.")
        turns, literals = shield(self.turns(messages), control_strings(tokenizer, self.tags))
        if self.zero:
            text = base_prompt(turns, self.thinks, self.opening if self.prefill else "")
        else:
            template = self.template(tokenizer)
            text = template.prompt(turns)
            if self.prefill and template.thought(self.probe) == "none":
                text += self.opening
        return one_bos(encode(text, literals, tokenizer), tokenizer)

    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Token ids that end a sample: the tokenizer's eos token and `turn_end`.

        Args:
            tokenizer: The policy's tokenizer.

        Returns:
            Distinct ids, the eos token first; empty for a tokenizer with neither.
        """
        ids = (tokenizer.eos_token_id, self.turn_end(tokenizer))
        return tuple(dict.fromkeys(token for token in ids if token is not None))

    def turn_end(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """The token that ends an assistant's turn, in training data and in samples.

        Args:
            tokenizer: The policy's tokenizer.

        Returns:
            For chat formats the special token that the template writes behind the turn. It may differ from the eos
            token, which in many base models ends a document. For others the eos token. None if there is none.
        """
        return tokenizer.eos_token_id if self.zero else self.template(tokenizer).turn_end()

    def turns(self, messages: Sequence[Message]) -> list[Message]:
        """Adds `instruction` to the system turn of a conversation."""
        turns = list(messages)
        if self.instruction is None:
            return turns
        if turns[0]["role"] != "system":
            return [Message(role="system", content=self.instruction), *turns]
        return [Message(role="system", content=f"{turns[0]['content']}\n\n{self.instruction}"), *turns[1:]]

    def target(self, thought: str, response: str) -> str:
        """Writes the completion that SFT trains on.

        Args:
            thought: Thought text; ignored by formats that do not think.
            response: Response text.

        Returns:
            Completion text without the prefilled opening tag and without an end-of-turn token. `split` returns both
            parts, stripped, with status OK.

        Raises:
            UserError: `split` does not recover the parts: the response is blank, or a part contains a tag that changes
                the split.
        """
        thought, response = thought.strip(), response.strip()
        if self.zero:
            text = f"{_RESPONSE[0]} {response} {_RESPONSE[1]}"
            text = f"{_THINK[0]} {thought} {_THINK[1]} {text}" if self.thinks else text
        else:
            text = f"{_THINK[0]}\n{thought}\n{_THINK[1]}\n\n{response}" if self.thinks else response
        text = text.removeprefix(self.opening) if self.prefill else text
        if self.split(text) != Split(thought if self.thinks else "", response, Status.OK):
            raise UserError(
                f"a thought and response cannot be written in format {self.name} and split again; "
                f"drop rows with a blank response or with one of {' '.join(self.tags)} in their text."
            )
        return text

    def split(self, text: str) -> Split:
        """Splits a completion at the first close tag; never raises.

        The first rule that applies determines the status:

        1. Thinking formats: without ``</think>`` it is UNCLOSED (all text is thought); without a leading ``<think>`` it
           is UNOPENED (all text before the close tag is thought).
        2. `zero_no_think`: a thought tag anywhere is STRAY_TAG.
        3. Zero formats: without ``<response>`` next it is UNOPENED. The response ends at the first ``</response>``, or
           at the end of the text if the length limit or an eos token came first.
        4. A tag of `tags` in the rest, or after ``</response>``, is STRAY_TAG.
        5. A response without a visible character (only white space, control and zero-width characters) is
           EMPTY_RESPONSE.

        White space around tags is ignored. With `prefill` the first tag is optional. A truncated tag (``</respon``) is
        plain text.

        Args:
            text: Completion from `decode`, without the prefilled opening tag.

        Returns:
            Stripped parts and status; the response is empty unless the status is OK.
        """
        thought, rest = "", text
        if self.thinks:
            opened, body = _remove_prefix(rest, _THINK[0])
            thought, closed, rest = body.partition(_THINK[1])
            thought = thought.strip()
            if not closed:
                return Split(thought, "", Status.UNCLOSED)
            if not (opened or self.prefill):
                return Split(thought, "", Status.UNOPENED)
        elif self.zero and any(tag in rest for tag in _THINK):
            return Split("", "", Status.STRAY_TAG)
        tail = ""
        if self.zero:
            opened, body = _remove_prefix(rest, _RESPONSE[0])
            if not (opened or (self.prefill and not self.thinks)):
                return Split(thought, "", Status.UNOPENED)
            rest, _, tail = body.partition(_RESPONSE[1])
        if any(tag in rest or tag in tail for tag in self.tags):
            return Split(thought, "", Status.STRAY_TAG)
        if not any(map(_is_visible, rest)):
            return Split(thought, "", Status.EMPTY_RESPONSE)
        return Split(thought, rest.strip(), Status.OK)

    def decode(self, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
        """Decodes sampled tokens to the text that `split` reads.

        Args:
            ids: Completion token ids, the stopping token included.
            tokenizer: The policy's tokenizer.

        Returns:
            Text without special tokens, but with the format's tags, even if they are special tokens of the tokenizer.
        """
        return self._decoder(tokenizer)(ids)

    def _decoder(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
        """`decode` for one tokenizer; looks up its special tokens once."""
        drop = set(control_strings(tokenizer, self.tags).values())

        def decode(ids: Sequence[int]) -> str:
            kept = [token for token in ids if token not in drop]
            return str(tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))

        return decode

    def thought_tokens(self, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
        """Counts the sampled tokens that belong to the thought.

        Args:
            ids: Completion token ids.
            tokenizer: The policy's tokenizer.

        Returns:
            Number of tokens up to and including the one that completes the first close tag; all tokens if there is
            none, 0 for formats that do not think. The count is found by bisection: text up to a complete tag does not
            change when more tokens follow.
        """
        if not self.thinks:
            return 0
        decode = self._decoder(tokenizer)
        before, closed, _ = decode(ids).partition(_THINK[1])
        if not closed:
            return len(ids)
        head = before + closed
        low, high = 0, len(ids)  # decode(ids[:high]) starts with head, decode(ids[:low]) does not
        while high - low > 1:
            middle = (low + high) // 2
            if decode(ids[:middle]).startswith(head):
                high = middle
            else:
                low = middle
        return high

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON or a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ThinkingFormat:
        """Inverse of `to_dict`.

        Raises:
            UserError: `values` is not a mapping with exactly the fields of this class, or a value is invalid. Fields
                that version 0.2 did not have may be missing.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or not set(names[:3]) <= set(values) <= set(names):
            found = ", ".join(map(str, values)) if isinstance(values, Mapping) else f"a {type(values).__name__}"
            raise UserError(f"a thinking format requires exactly the keys {', '.join(names)}; found {found or 'none'}.")
        return cls(**values)

    def save(self, folder: str | Path) -> None:
        """Writes `thinking_format.json` to a folder and creates the folder if necessary."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> ThinkingFormat:
        """Reads `thinking_format.json` from a folder.

        Raises:
            UserError: The file is missing, is not JSON, or is not a thinking format.
        """
        path = Path(folder) / FILE_NAME
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); use a folder that rlmt saved.") from error
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not valid JSON ({reason}); restore it from the checkpoint.") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def _remove_prefix(text: str, tag: str) -> tuple[bool, str]:
    """Whether a text starts with a tag, ignoring white space, and the text after it (all of it if not)."""
    stripped = text.lstrip()
    return (True, stripped[len(tag) :]) if stripped.startswith(tag) else (False, text)


def _is_visible(char: str) -> bool:
    """Whether a character is visible by itself; characters that Python does not know count as visible."""
    return unicodedata.category(char) not in _INVISIBLE and char not in _FILLERS
