"""Reads prompt sets: parquet, jsonl, json and csv files, or a data set on the Hugging Face hub.

One column holds the prompts: `prompt` (text or a list of messages), else `messages`. A prompt is a conversation in
which user and assistant take turns, with an optional system turn first; it ends with a user's turn, because the policy
writes the next one. A row that ends with an assistant's turn (preference and SFT data) is an error and not silently
cut: its last turn may be a target that the user did not mean to throw away. Other columns are not read.

Every bad row is reported with its file and row number before any model is loaded. Text is kept as it is, control
characters included; only lone surrogates are refused, because no tokenizer can encode them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b

from torch.utils.data import Dataset

from rlmt.data.messages import check_system, check_turns, kind, text_problem, to_conversation, with_system
from rlmt.data.tables import parse_rows, read_table
from rlmt.errors import UserError
from rlmt.types import Message, Prompt

DEFAULT_COLUMNS = ("prompt", "messages")
"""Columns looked for, in this order, when none is named."""


class PromptDataset(Dataset[Prompt]):
    """A map-style data set over prompts held in memory.

    Args:
        prompts: the prompts, in any order.
    """

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = list(prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, position: int) -> Prompt:
        return self.prompts[position]

    @property
    def keys(self) -> list[int]:
        """Row number of each prompt, the identity that orders and seeds depend on."""
        return [prompt.index for prompt in self.prompts]

    def fingerprint(self) -> str:
        """A digest of all rows: equal for equal prompts in equal order, on every machine."""
        digest = blake2b(digest_size=16)
        for prompt in self.prompts:
            digest.update(json.dumps([prompt.index, prompt.messages]).encode())
        return digest.hexdigest()


def load_prompts(source: str, column: str | None = None, system: str | None = None) -> list[Prompt]:
    """Reads all prompts of a file or a hub data set.

    A source is a file if it exists, has one of the known suffixes (.parquet, .jsonl, .json, .csv) or is written like a
    path; anything else is the name of a hub data set, whose `train` split is read.

    Args:
        source: path or hub name.
        column: the column that holds the prompts; None takes `prompt`, else `messages`.
        system: system prompt for rows that have none.

    Returns:
        The prompts in the order of the rows, `index` counting from 0.

    Raises:
        UserError: the source cannot be read, lacks the column, is empty, or holds bad rows.
    """
    check_system(system)
    rows = read_table(source, lambda found: [_pick_column(found, column, source)], "prompts")
    return parse_rows(
        source, rows, lambda index, cells: Prompt(index, _to_messages(*next(iter(cells.items())), system))
    )


def _to_messages(column: str, cell: object, system: str | None) -> list[Message]:
    """Turns one cell into a conversation; ValueError says in a few words what is wrong with it."""
    if isinstance(cell, str) and column != "messages":
        if problem := text_problem(cell):
            raise ValueError(f"`{column}` {problem}")
        messages = [Message(role="user", content=cell)]
    elif isinstance(cell, list):
        messages = to_conversation(cell)
    else:
        wanted = "a list of messages" if column == "messages" else "text or a list of messages"
        raise ValueError(f"`{column}` is {kind(cell)}, not {wanted}")
    check_turns(messages)
    if messages[-1]["role"] != "user":
        raise ValueError("ends with an assistant's turn where a prompt ends with a user's")
    return with_system(messages, system)


def _pick_column(found: Sequence[str], column: str | None, source: str) -> str:
    for name in (column,) if column is not None else DEFAULT_COLUMNS:
        if name in found:
            return name
    wanted = repr(column) if column is not None else " or ".join(map(repr, DEFAULT_COLUMNS))
    columns = ", ".join(map(repr, found))
    raise UserError(f"{source} has no column {wanted}, only {columns}: rename one, or set --data.column")
