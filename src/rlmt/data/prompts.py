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
from typing import NamedTuple, Protocol

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from rlmt.data.generation import PolicySource
from rlmt.data.messages import check_system, check_turns, text_problem, to_conversation, type_name, with_system
from rlmt.data.sampler import shuffled
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
        raise ValueError(f"`{column}` is {type_name(cell)}, not {wanted}")
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


DEFAULT_VAL_SIZE = 64
"""Prompts split off for validation when neither `val_size` nor `val_prompts` is given."""


class SplitOptions(Protocol):
    """Those of `RolloutDataModule` that say what is trained on."""

    prompts: str
    val_prompts: str | None
    val_size: int | None
    column: str | None
    system: str | None
    max_prompt_tokens: int
    seed: int


class PromptSets(NamedTuple):
    """Prompts that are short enough."""

    all: list[Prompt]
    """Of the training file, in the order of its rows."""
    train: list[Prompt]
    held_out: list[Prompt]


def load_prompt_sets(options: SplitOptions, source: PolicySource) -> PromptSets:
    """Reads the prompts and splits them in an order that depends on the seed and each prompt's row alone.

    Args:
        options: what to read.
        source: renders the prompts.

    Raises:
        UserError: a file cannot be read, or has too few prompts that are short enough.
    """
    fitting = _read(options.prompts, options, source)
    mixed = [fitting[i] for i in shuffled([prompt.index for prompt in fitting], options.seed, "split")]
    if options.val_prompts is not None:
        held_out = _read(options.val_prompts, options, source)
        size = len(held_out) if options.val_size is None else options.val_size
        sets = PromptSets(fitting, mixed, held_out[:size])
    else:
        held_out = mixed
        size = DEFAULT_VAL_SIZE if options.val_size is None else options.val_size
        sets = PromptSets(fitting, mixed[size:], mixed[:size])
    if size > len(held_out):
        raise UserError(
            f"--data.val_size asks for {size:,} validation prompts, but {options.val_prompts or options.prompts} has "
            f"{len(held_out):,}: lower it, or give --data.val_prompts"
        )
    rank_zero_info(f"{len(sets.train):,} prompts to train on, {len(sets.held_out):,} to validate on")
    return sets


def _read(name: str, options: SplitOptions, source: PolicySource) -> list[Prompt]:
    """Loads one prompt set and drops the prompts that are too long once rendered."""
    prompts, limit = load_prompts(name, options.column, options.system), options.max_prompt_tokens
    fitting = []
    for prompt in prompts:
        try:
            length = len(source.format.render(prompt.messages, source.tokenizer))
        except UserError as error:
            raise UserError(f"{name}: row {prompt.index + 1}: {error}") from error
        if length <= limit:
            fitting.append(prompt)
    if not fitting:
        raise UserError(f"{name}: all {len(prompts):,} prompts are longer than --data.max_prompt_tokens {limit:,}")
    if len(fitting) < len(prompts):
        dropped = len(prompts) - len(fitting)
        rank_zero_info(f"dropped {dropped:,} of {len(prompts):,} prompts longer than {limit:,} tokens ({name})")
    return fitting
