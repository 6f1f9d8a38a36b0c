"""Reads prompt sets: parquet, jsonl, json and csv files, folders of them, or a dataset on the Hugging Face Hub.

One column contains the prompts: `prompt` (text or a list of messages), else `messages`; a list of messages can be JSON
text. A prompt is a conversation in which user and assistant alternate, with an optional system turn first. It ends with
a user turn, because the policy writes the next one. A row that ends with an assistant turn (preference and SFT data) is
an error and is not truncated silently: its last turn may be a target that the user wants to keep. Other columns are
read only if they are named; they travel with the prompt as `Prompt.extra`.

Every invalid row is reported with its file and row number before any model is loaded. Text is used unchanged, control
characters included; only lone surrogates are refused, because no tokenizer can encode them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple, Protocol

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from rlmt.data.generation import PolicySource
from rlmt.data.messages import (
    check_system,
    check_turns,
    decode_messages,
    text_problem,
    to_conversation,
    type_name,
    with_system,
)
from rlmt.data.sampler import shuffled
from rlmt.data.tables import Cells, DataSource, held_out_source, parse_rows, read_table
from rlmt.errors import UserError
from rlmt.types import Message, Prompt

DEFAULT_COLUMNS = ("prompt", "messages")
"""Columns to look for, in this order, if `column` is not set."""


class PromptDataset(Dataset[Prompt]):
    """A map-style dataset over prompts in memory.

    Args:
        prompts: The prompts, in any order.
    """

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = list(prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, position: int) -> Prompt:
        return self.prompts[position]

    @property
    def keys(self) -> list[int]:
        """Row number of each prompt; orders and seeds depend on it."""
        return [prompt.index for prompt in self.prompts]

    def fingerprint(self) -> str:
        """A hash of all rows: equal for equal prompts in equal order, on every machine."""
        digest = blake2b(digest_size=16)
        for prompt in self.prompts:
            row = [prompt.index, prompt.messages, *([prompt.extra] if prompt.extra else [])]
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


def load_prompts(
    source: str | DataSource,
    column: str | None = None,
    system: str | None = None,
    extra_columns: Sequence[str] = (),
    options: str = "--data.",
) -> list[Prompt]:
    """Reads all prompts of a file, a folder or a Hub dataset; `rlmt.data.tables.read_table` says which is which.

    Args:
        source: Path or Hub name, or either with a split and a subset.
        column: Column with the prompts; None uses `prompt`, else `messages`.
        system: System prompt for rows without one.
        extra_columns: Columns to read into `Prompt.extra`.
        options: Start of the names of the caller's options, for messages.

    Returns:
        The prompts in the order of the rows, `index` counting from 0.

    Raises:
        UserError: The source cannot be read, lacks a column, is empty, or has invalid rows.
    """
    check_system(system)

    def select(found: Sequence[str]) -> list[str]:
        if missing := [name for name in extra_columns if name not in found]:
            columns = ", ".join(map(repr, found))
            raise UserError(
                f"{options}extra_columns: {source} has no column {missing[0]!r}, only {columns}; rename one."
            )
        return list(dict.fromkeys([_select_column(found, column, source, options), *extra_columns]))

    def parse(index: int, cells: Cells) -> Prompt:
        prompt_column = next(iter(cells))
        extra = {name: cells[name] for name in extra_columns}
        for name, value in extra.items():
            _check_extra(name, value)
        return Prompt(index, _to_messages(prompt_column, cells[prompt_column], system), extra)

    return parse_rows(source, read_table(source, select, "prompts"), parse)


def _to_messages(column: str, cell: object, system: str | None) -> list[Message]:
    """Converts a cell to a conversation; raises ValueError with a short reason."""
    try:
        cell = decode_messages(cell)
    except ValueError as error:
        raise ValueError(f"`{column}` {error}") from error
    if isinstance(cell, str) and column != "messages":
        if problem := text_problem(cell):
            raise ValueError(f"`{column}` {problem}")
        messages = [Message(role="user", content=cell)]
    elif isinstance(cell, list):
        messages = to_conversation(cell)
    else:
        expected = "a list of messages" if column == "messages" else "text or a list of messages"
        raise ValueError(f"`{column}` is {type_name(cell)}, not {expected}")
    check_turns(messages)
    if messages[-1]["role"] != "user":
        raise ValueError("ends with an assistant turn; a prompt ends with a user turn")
    return with_system(messages, system)


def _check_extra(column: str, value: object) -> None:
    """Raises ValueError with a short reason unless a value is JSON: it is written to files and sent to services."""
    if isinstance(value, str):
        if value.strip() and (problem := text_problem(value)):
            raise ValueError(f"`{column}` {problem}")
    elif isinstance(value, list):
        for item in value:
            _check_extra(column, item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_extra(column, key)
            _check_extra(column, item)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"`{column}` has the number {value}, which JSON cannot represent")
    elif value is not None and not isinstance(value, int):
        raise ValueError(f"`{column}` has a value {type_name(value)}; use text, numbers, lists or objects")


def _select_column(found: Sequence[str], column: str | None, source: str | DataSource, options: str) -> str:
    for name in (column,) if column is not None else DEFAULT_COLUMNS:
        if name in found:
            return name
    expected = repr(column) if column is not None else " or ".join(map(repr, DEFAULT_COLUMNS))
    columns = ", ".join(map(repr, found))
    raise UserError(f"{source} has no column {expected}, only {columns}; rename one, or set {options}column.")


DEFAULT_VAL_SIZE = 64
"""Prompts split off for validation if no option names validation prompts or their number."""


class SplitOptions(Protocol):
    """Options of `RolloutDataModule` that select the training and validation prompts."""

    prompts: str
    split: str | None
    subset: str | None
    val_prompts: str | None
    val_split: str | None
    val_size: int | None
    column: str | None
    system: str | None
    extra_columns: list[str]
    max_prompt_tokens: int
    seed: int


class PromptSets(NamedTuple):
    """Training and validation prompts within the length limit."""

    train: list[Prompt]
    """Training prompts, in a shuffled order."""
    held_out: list[Prompt]
    """Validation prompts."""


def training_source(options: SplitOptions) -> DataSource:
    """The source of the training prompts."""
    return DataSource(options.prompts, options.split, options.subset)


def split_prompts(fitting: list[Prompt], options: SplitOptions, source: PolicySource) -> PromptSets:
    """Splits prompts; the split depends only on the seed and each prompt's row number.

    A training prompt that equals a validation prompt is dropped, and the number of these is logged.

    Args:
        fitting: The prompts of the training source within the length limit, in the order of the rows.
        options: Files, sizes and seed.
        source: Renders the prompts.

    Returns:
        The training and validation prompts.

    Raises:
        UserError: The file of the validation prompts cannot be read, or there are too few prompts.
    """
    shuffled_prompts = [fitting[i] for i in shuffled([prompt.index for prompt in fitting], options.seed, "split")]
    other = held_out_source(training_source(options), options.val_prompts, options.val_split)
    held_out = shuffled_prompts if other is None else load_fitting_prompts(other, options, source)
    size = options.val_size
    if size is None:
        size = DEFAULT_VAL_SIZE if other is None else len(held_out)
    if size > len(held_out):
        raise UserError(
            f"--data.val_size is {size:,}, but {other or options.prompts} has {len(held_out):,} prompts; "
            "lower it, or set --data.val_prompts."
        )
    sets = PromptSets(shuffled_prompts[size:] if other is None else shuffled_prompts, held_out[:size])
    sets = sets._replace(train=_without_held_out(sets.train, sets.held_out, options))
    rank_zero_info(f"{len(sets.train):,} prompts to train on, {len(sets.held_out):,} to validate on")
    return sets


def _without_held_out(train: list[Prompt], held_out: list[Prompt], options: SplitOptions) -> list[Prompt]:
    """Drops training prompts that are validation prompts, too, so that validation measures prompts not trained on."""
    known = {json.dumps(prompt.messages) for prompt in held_out}
    kept = [prompt for prompt in train if json.dumps(prompt.messages) not in known]
    if train and not kept:
        raise UserError(
            f"--data.val_prompts {options.val_prompts or options.prompts}: all training prompts are validation "
            "prompts, too; give other prompts for validation."
        )
    if dropped := len(train) - len(kept):
        rank_zero_info(
            f"dropped {dropped:,} of {len(train):,} training prompts that equal a validation prompt ({options.prompts})"
        )
    return kept


def load_fitting_prompts(name: DataSource, options: SplitOptions, source: PolicySource) -> list[Prompt]:
    """Loads one prompt set and drops prompts with more than `max_prompt_tokens` rendered tokens.

    Args:
        name: Source of the prompts.
        options: Column, system prompt and length limit.
        source: Renders the prompts.

    Returns:
        The prompts within the limit, in the order of the rows.

    Raises:
        UserError: The source cannot be read, or all prompts are too long.
    """
    prompts = load_prompts(name, options.column, options.system, options.extra_columns)
    limit = options.max_prompt_tokens
    fitting = []
    for prompt in prompts:
        try:
            length = len(source.format.render(prompt.messages, source.tokenizer))
        except UserError as error:
            raise UserError(f"{name}: row {prompt.index + 1}: {error}") from error
        if length <= limit:
            fitting.append(prompt)
    if not fitting:
        raise UserError(
            f"{name}: all {len(prompts):,} prompts are longer than --data.max_prompt_tokens {limit:,}; raise it."
        )
    if len(fitting) < len(prompts):
        dropped = len(prompts) - len(fitting)
        rank_zero_info(f"dropped {dropped:,} of {len(prompts):,} prompts longer than {limit:,} tokens ({name})")
    return fitting
