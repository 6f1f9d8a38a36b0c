"""Demonstrations for supervised fine-tuning: reads them and encodes them in a thinking format.

There are three kinds of rows, distinguished by the columns that are filled:

- `response`, with `prompt` (text or a list of messages) and `thought`;
- `messages`, a chat that ends with an assistant turn; a turn contains its thought as `<think>…</think>`;
- `text`, a document without turns, such as pre-training text mixed in.

The thought is split from a turn by the one split rule of `ThinkingFormat`, and written again in the format that is
trained. So the same file works for think and no_think. Which turns are trained does not depend on the format: those
with a thought, or all turns of a chat without thoughts.

Every trained turn is a separate sequence: the conversation before it as the policy sees it when it samples, past turns
without their thoughts, then the target. A single sequence for all turns would show the thoughts of earlier turns to
later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlmt.annotations import PreTrainedTokenizerBase
from rlmt.data.messages import (
    check_system,
    check_turns,
    decode_messages,
    text_problem,
    to_conversation,
    type_name,
    with_system,
)
from rlmt.data.supervised import EncodedRow, SupervisedDataModule
from rlmt.data.tables import Cells, DataSource, parse_rows, read_table
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.formats.tokenizer import control_strings, encode, one_bos, shield
from rlmt.options import PositiveInt
from rlmt.types import Message

COLUMNS = ("prompt", "thought", "response", "messages", "text")
"""The columns that are read."""

_DATA_FORMAT = ThinkingFormat("think", prefill=True)
"""How thoughts are written in the data; the opening tag is optional, because policies with `prefill` omit it."""
_TAGS = ("<think>", "</think>")


@dataclass(frozen=True)
class Turn:
    """One assistant turn to train on."""

    context: list[Message]
    """The conversation before it, without thoughts."""
    thought: str
    """Its thought, or ""."""
    response: str
    """The text that the user sees."""


@dataclass(frozen=True)
class Demonstration:
    """One row of the dataset."""

    index: int
    """Row number, from 0."""
    turns: list[Turn]
    """The turns to train on; empty for a document."""
    text: str = ""
    """The document, or ""."""


@dataclass(frozen=True, eq=False)
class EncodedDemonstration(EncodedRow):
    """A row as tokens: one sequence per trained turn, prompt and target."""

    prompts: list[int]
    """Number of prompt tokens of each sequence, at least 1; the rest is the target."""


def load_demonstrations(source: str | DataSource, thinks: bool, system: str | None = None) -> list[Demonstration]:
    """Reads all demonstrations of a file, a folder or a Hub dataset.

    Args:
        source: Path or Hub name, or either with a split and a subset.
        thinks: Whether thoughts are trained, so that every row requires one.
        system: System prompt for rows without one.

    Returns:
        The demonstrations, in the order of the rows.

    Raises:
        UserError: The source cannot be read, lacks columns, is empty, or has invalid rows.
    """
    check_system(system)
    rows = read_table(source, lambda found: _select_columns(found, source), "demonstrations")
    return parse_rows(source, rows, lambda index, cells: _parse(index, cells, thinks, system))


def _select_columns(found: Sequence[str], source: str | DataSource) -> list[str]:
    if not ({"messages", "text"}.intersection(found) or {"prompt", "response"} <= set(found)):
        raise UserError(
            f"{source} has neither a column 'messages' nor both 'prompt' and 'response', only "
            f"{', '.join(map(repr, found))}; rename them."
        )
    return [name for name in COLUMNS if name in found]


def _parse(index: int, cells: Cells, thinks: bool, system: str | None) -> Demonstration:
    if cells.get("response") is not None:
        if cells.get("messages") is not None:
            raise ValueError("both `messages` and `response` are filled")
        return Demonstration(index, [_turn_from_columns(cells, thinks, system)])
    if cells.get("messages") is not None:
        return Demonstration(index, _turns_from_chat(cells["messages"], thinks, system))
    if cells.get("text") is not None:
        if problem := text_problem(cells["text"]):
            raise ValueError(f"`text` {problem}")
        return Demonstration(index, [], str(cells["text"]))
    raise ValueError(f"{' and '.join(f'`{name}`' for name in cells if name not in ('prompt', 'thought'))} missing")


def _turn_from_columns(cells: Cells, thinks: bool, system: str | None) -> Turn:
    context = prompt_messages(cells.get("prompt"))
    thought, response = _split(cells["response"], "`response`")
    if cells.get("thought") is not None:
        if thought is not None:
            raise ValueError("`response` contains a thought, and `thought` is filled, too")
        if not isinstance(cells["thought"], str):
            raise ValueError(f"`thought` is {type_name(cells['thought'])}, not text")
        thought = cells["thought"]
    if thinks:
        _check_thought(thought, "`thought`")
    context = [_without_thought(message, f"`prompt` turn {n}") for n, message in enumerate(context, start=1)]
    return Turn(with_system(context, system), thought or "", response)


def _turns_from_chat(cell: object, thinks: bool, system: str | None) -> list[Turn]:
    cell = _decoded("messages", cell)
    if not isinstance(cell, list):
        raise ValueError(f"`messages` is {type_name(cell)}, not a list of messages")
    messages = to_conversation(cell)
    check_turns(messages)
    if messages[-1]["role"] != "assistant":
        raise ValueError("ends with a user turn; a demonstration ends with an assistant turn")
    past: list[Message] = []
    found: list[tuple[Turn, str | None, str]] = []
    for number, message in enumerate(messages, start=1):
        response = message["content"]
        if message["role"] == "assistant":
            thought, response = _split(response, f"turn {number}")
            context = with_system(list(past), system)
            found.append((Turn(context, thought or "", response), thought, f"the thought of turn {number}"))
        past.append(Message(role=message["role"], content=response))
    with_thought = [turn for turn in found if turn[1] is not None]
    if thinks:
        for _, thought, where in with_thought or found[-1:]:
            _check_thought(thought, where)
    return [turn for turn, _, _ in with_thought or found]


def _split(text: object, where: str) -> tuple[str | None, str]:
    """Splits an assistant turn into its thought, or None, and its response."""
    if problem := text_problem(text):
        raise ValueError(f"{where} {problem}")
    assert isinstance(text, str)
    if not any(tag in text for tag in _TAGS):
        return None, text
    split = _DATA_FORMAT.split(text)
    if not split.ok:
        raise ValueError(f"{where} contains a thought that cannot be separated from the response ({split.status})")
    return split.thought, split.response


def _check_thought(thought: str | None, where: str) -> None:
    """Raises ValueError for a missing or blank thought."""
    if not (thought or "").strip():
        raise ValueError(f"{where} is {'missing' if thought is None else 'empty'}, but the format requires one")


def _without_thought(message: Message, where: str) -> Message:
    """Removes the thought from an assistant message; other messages are returned unchanged."""
    if message["role"] != "assistant":
        return message
    return Message(role="assistant", content=_split(message["content"], where)[1])


def _decoded(column: str, cell: object) -> object:
    """As `decode_messages`, with the column in its error."""
    try:
        return decode_messages(cell)
    except ValueError as error:
        raise ValueError(f"`{column}` {error}") from error


def prompt_messages(cell: object) -> list[Message]:
    """The conversation in a cell of the column `prompt`: text, or messages that end with a user turn."""
    cell = _decoded("prompt", cell)
    if isinstance(cell, list):
        messages = to_conversation(cell)
        check_turns(messages)
        if messages[-1]["role"] != "user":
            raise ValueError("`prompt` ends with an assistant turn; a prompt ends with a user turn")
        return messages
    if problem := text_problem(cell):
        raise ValueError(f"`prompt` {problem}")
    return [Message(role="user", content=str(cell))]


class DemonstrationEncoder:
    """Encodes demonstrations as tokens.

    Prompts are exactly those that the policy samples from. A target is encoded separately, as it is sampled, and ends
    with the token that ends the assistant turn. Control strings typed into a text are encoded as plain characters.

    Args:
        format: Thinking format of the targets.
        tokenizer: The policy's tokenizer.
    """

    def __init__(self, format: ThinkingFormat, tokenizer: PreTrainedTokenizerBase) -> None:
        self.format = format
        self.tokenizer = tokenizer
        self._control = control_strings(tokenizer, format.tags)
        end = format.turn_end(tokenizer)
        self._turn_end = [] if end is None else [end]
        self._document_end = list(format.stop_token_ids(tokenizer)[:1])

    def __call__(self, row: Demonstration) -> EncodedDemonstration:
        """Encodes one sequence per trained turn, or one for a document.

        Args:
            row: The demonstration.

        Returns:
            Its token sequences and their prompt lengths.

        Raises:
            UserError: The format cannot write a turn so that `split` recovers it.
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
        """Token ids of a text, control strings in it as plain characters."""
        (message,), literals = shield([Message(role="assistant", content=text)], self._control)
        return encode(message["content"], literals, self.tokenizer)


class SFTDataModule(SupervisedDataModule[EncodedDemonstration]):
    """Demonstrations for supervised fine-tuning, in the thinking format of the module.

    Args:
        path: File (.parquet, .jsonl, .json, .csv), folder or Hub dataset; `rlmt.data.demonstrations` lists its columns.
        batch_size: Demonstrations per optimizer step, over all ranks.
        max_length: Maximum tokens of prompt and target. Longer demonstrations are dropped; their number is logged.
        system: System prompt for rows without one.
        **options: Options of `SupervisedDataModule`.

    Raises:
        UserError: An argument is out of range.
    """

    row_noun = "demonstrations"

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

    def read(self, source: DataSource, module: Any) -> list[EncodedDemonstration]:
        """Reads the demonstrations of a source and encodes them in the module's format."""
        encode_row = DemonstrationEncoder(module.format, module.tokenizer)
        encoded = []
        for row in load_demonstrations(source, module.format.thinks, self.system):
            try:
                encoded.append(encode_row(row))
            except UserError as error:
                raise UserError(f"{source}: row {row.index + 1}: {error}") from error
        return encoded
