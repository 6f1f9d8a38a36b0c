"""Demonstrations to fine-tune on: reading them, and writing them out in a thinking format.

A row is one of three, told apart by the columns that are filled:

- `response`, with `prompt` (text or a list of messages) and `thought`;
- `messages`, a chat that ends with an assistant's turn; a turn's thought stands in it as `<think>…</think>`;
- `text`, a document without turns, such as pre-training text mixed in.

The thought is taken out of a turn by the same split rule as everywhere, and written again by the format that is
trained. So the same file serves think and no_think, and which turns are trained does not depend on the format: those
that hold a thought, and all of a chat without any.

Every trained turn is a sequence of its own: the conversation before it as the policy will see it when it samples, past
turns without their thoughts, and then the target. One sequence for all turns would show later turns the thoughts of
earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlmt.data.messages import check_system, check_turns, text_problem, to_conversation, type_name, with_system
from rlmt.data.supervised import EncodedRow, SupervisedDataModule
from rlmt.data.tables import Cells, parse_rows, read_table
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.formats.tokenizer import control_strings, encode, one_bos, shield, turn_end
from rlmt.ranges import PositiveInt
from rlmt.types import Message

COLUMNS = ("prompt", "thought", "response", "messages", "text")
"""The columns that are read."""

_DATA_FORMAT = ThinkingFormat("think", prefill=True)
"""How a thought stands in the data; the opening tag may be missing, as in what a policy with `prefill` wrote."""
_TAGS = ("<think>", "</think>")


@dataclass(frozen=True)
class Turn:
    """One assistant's turn to train on."""

    context: list[Message]
    """The conversation up to it, without thoughts."""
    thought: str
    """Its thought, or ""."""
    response: str
    """What the user sees."""


@dataclass(frozen=True)
class Demonstration:
    """One row."""

    index: int
    """Row number, from 0."""
    turns: list[Turn]
    """The turns to train on; none in a document."""
    text: str = ""
    """The document, if it is one."""


@dataclass(frozen=True, eq=False)
class EncodedDemonstration(EncodedRow):
    """A row as tokens: one sequence a trained turn, prompt and target."""

    prompts: list[int]
    """How many tokens of each sequence are its prompt, at least 1: the rest is the target."""


def load_demonstrations(source: str, thinks: bool, system: str | None = None) -> list[Demonstration]:
    """Reads all demonstrations of a file or a hub data set.

    Args:
        source: path or hub name.
        thinks: whether thoughts are trained, so that a row must have one.
        system: system prompt for rows that have none.

    Raises:
        UserError: the source cannot be read, lacks columns, is empty, or holds bad rows.
    """
    check_system(system)
    rows = read_table(source, lambda found: _choose(found, source), "demonstrations")
    return parse_rows(source, rows, lambda index, cells: _parse(index, cells, thinks, system))


def _choose(found: Sequence[str], source: str) -> list[str]:
    if not ({"messages", "text"}.intersection(found) or {"prompt", "response"} <= set(found)):
        raise UserError(
            f"{source} has neither a column 'messages' nor both 'prompt' and 'response', only "
            f"{', '.join(map(repr, found))}: rename them"
        )
    return [name for name in COLUMNS if name in found]


def _parse(index: int, cells: Cells, thinks: bool, system: str | None) -> Demonstration:
    if cells.get("response") is not None:
        if cells.get("messages") is not None:
            raise ValueError("both `messages` and `response` are filled")
        return Demonstration(index, [_turn_of_columns(cells, thinks, system)])
    if cells.get("messages") is not None:
        return Demonstration(index, _turns_of_chat(cells["messages"], thinks, system))
    if cells.get("text") is not None:
        if problem := text_problem(cells["text"]):
            raise ValueError(f"`text` {problem}")
        return Demonstration(index, [], str(cells["text"]))
    raise ValueError(f"{' and '.join(f'`{name}`' for name in cells if name not in ('prompt', 'thought'))} missing")


def _turn_of_columns(cells: Cells, thinks: bool, system: str | None) -> Turn:
    context = prompt_messages(cells.get("prompt"))
    thought, response = _split(cells["response"], "`response`")
    if cells.get("thought") is not None:
        if thought is not None:
            raise ValueError("`response` holds a thought, and there is a `thought` besides")
        if not isinstance(cells["thought"], str):
            raise ValueError(f"`thought` is {type_name(cells['thought'])}, not text")
        thought = cells["thought"]
    if thinks:
        _check_thought(thought, "`thought`")
    context = [_without_thought(message, f"`prompt` turn {n}") for n, message in enumerate(context, start=1)]
    return Turn(with_system(context, system), thought or "", response)


def _turns_of_chat(cell: object, thinks: bool, system: str | None) -> list[Turn]:
    if not isinstance(cell, list):
        raise ValueError(f"`messages` is {type_name(cell)}, not a list of messages")
    messages = to_conversation(cell)
    check_turns(messages)
    if messages[-1]["role"] != "assistant":
        raise ValueError("ends with a user's turn where a demonstration ends with an assistant's")
    past: list[Message] = []
    found: list[tuple[Turn, str | None, str]] = []
    for number, message in enumerate(messages, start=1):
        response = message["content"]
        if message["role"] == "assistant":
            thought, response = _split(response, f"turn {number}")
            context = with_system(list(past), system)
            found.append((Turn(context, thought or "", response), thought, f"the thought of turn {number}"))
        past.append(Message(role=message["role"], content=response))
    holding = [turn for turn in found if turn[1] is not None]
    if thinks:
        for _, thought, where in holding or found[-1:]:
            _check_thought(thought, where)
    return [turn for turn, _, _ in holding or found]


def _split(text: object, where: str) -> tuple[str | None, str]:
    """Thought, None if there is none, and response of an assistant's turn."""
    if problem := text_problem(text):
        raise ValueError(f"{where} {problem}")
    assert isinstance(text, str)
    if not any(tag in text for tag in _TAGS):
        return None, text
    split = _DATA_FORMAT.split(text)
    if not split.ok:
        raise ValueError(f"{where} holds a thought that cannot be told from the response ({split.status})")
    return split.thought, split.response


def _check_thought(thought: str | None, where: str) -> None:
    if not (thought or "").strip():
        raise ValueError(f"{where} is {'missing' if thought is None else 'empty'}, and the format thinks")


def _without_thought(message: Message, where: str) -> Message:
    if message["role"] != "assistant":
        return message
    return Message(role="assistant", content=_split(message["content"], where)[1])


def prompt_messages(cell: object) -> list[Message]:
    """The conversation in a cell of the column `prompt`: text, or messages that end with a user's turn."""
    if isinstance(cell, list):
        messages = to_conversation(cell)
        check_turns(messages)
        if messages[-1]["role"] != "user":
            raise ValueError("`prompt` ends with an assistant's turn where a prompt ends with a user's")
        return messages
    if problem := text_problem(cell):
        raise ValueError(f"`prompt` {problem}")
    return [Message(role="user", content=str(cell))]


class DemonstrationEncoder:
    """Writes demonstrations out as tokens.

    Prompts are exactly those that the policy samples from. A target is encoded on its own, as it is sampled, and ends
    with the token that ends the assistant's turn. Control strings typed into a text are encoded as plain characters.

    Args:
        format: how a thought is written.
        tokenizer: the policy's tokenizer.
    """

    def __init__(self, format: ThinkingFormat, tokenizer: PreTrainedTokenizerBase) -> None:
        self.format = format
        self.tokenizer = tokenizer
        self._control = control_strings(tokenizer, format.tags)
        stops = format.stop_token_ids(tokenizer)
        self._turn_end = turn_end(tokenizer, stops, format.zero)
        self._document_end = list(stops[:1])

    def __call__(self, row: Demonstration) -> EncodedDemonstration:
        """A sequence for each trained turn, or one for a document.

        Raises:
            UserError: the format cannot write a turn so that it is split again.
        """
        if not row.turns:
            document = one_bos(self._ids(row.text) + self._document_end, self.tokenizer)
            return EncodedDemonstration(row.index, [torch.tensor(document, dtype=torch.int32)], [1])
        sequences, prompts = [], []
        for turn in row.turns:
            prompt = self.format.render(turn.context, self.tokenizer)
            target = self._ids(self.format.target(turn.thought, turn.response)) + self._turn_end
            sequences.append(torch.tensor(prompt + target, dtype=torch.int32))
            prompts.append(len(prompt))
        return EncodedDemonstration(row.index, sequences, prompts)

    def _ids(self, text: str) -> list[int]:
        (message,), literals = shield([Message(role="assistant", content=text)], self._control)
        return encode(message["content"], literals, self.tokenizer)


class SFTDataModule(SupervisedDataModule[EncodedDemonstration]):
    """Demonstrations, written out in the format of the module that they train.

    Args:
        path: file (.parquet, .jsonl, .json, .csv) or hub data set, see `rlmt.data.demonstrations` for its columns.
        batch_size: demonstrations an optimizer step, over all ranks.
        max_length: longer demonstrations, in tokens of prompt and target, are dropped, and counted aloud.
        system: system prompt for rows that have none.
        **options: those of `SupervisedDataModule`.

    Raises:
        UserError: an argument is out of range.
    """

    what = "demonstrations"

    def __init__(
        self,
        path: str,
        batch_size: PositiveInt = 16,
        max_length: PositiveInt = 20000,
        system: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, batch_size, max_length, **options)
        self.system = system

    def read(self, source: str, module: Any) -> list[EncodedDemonstration]:
        """Reads the demonstrations of a source and writes them out in the module's format."""
        module.format.check(module.tokenizer, module.tokenizer.name_or_path)
        write = DemonstrationEncoder(module.format, module.tokenizer)
        encoded = []
        for row in load_demonstrations(source, module.format.thinks, self.system):
            try:
                encoded.append(write(row))
            except UserError as error:
                raise UserError(f"{source}: row {row.index + 1}: {error}") from error
        return encoded
