"""Preference data for reward-model training: which of two or more responses to a prompt is better.

There are two kinds of rows, distinguished by their columns:

- `chosen` and `rejected`, both text or both lists of messages. With text, or with lists of only the response's turn,
  `prompt` (text or a list of messages) contains the conversation before them; longer lists contain it themselves.
  Optional: `margin`, the number by which the chosen score should be higher; `chosen_attributes` and
  `rejected_attributes`, ratings.
- `prompt`, `responses` (a list of texts) and `scores` (one number per response): all pairs with different scores are
  compared, and each response passes through the model once. Optional: `attributes`, ratings of each response.

Ratings are a list of numbers, or an object of names and numbers. A column `subset` names the part of the data that a
row belongs to; accuracy is logged per subset. Pairs of equal responses carry no learning signal: they are dropped, and
their number is logged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from rlmt.data.demonstrations import prompt_messages
from rlmt.data.messages import check_turns, decode_messages, text_problem, to_conversation, type_name
from rlmt.data.supervised import EncodedRow, SupervisedDataModule
from rlmt.data.tables import Cells, DataSource, parse_rows, read_table
from rlmt.errors import UserError
from rlmt.options import PositiveInt
from rlmt.types import Message

_PAIR = ("chosen", "rejected")
_SCORED = ("prompt", "responses", "scores")
COLUMNS = (*_PAIR, *_SCORED, "margin", "subset", "chosen_attributes", "rejected_attributes", "attributes")
"""The columns that are read."""


@dataclass(frozen=True)
class Comparison:
    """One row of the dataset: several responses to one prompt."""

    index: int
    """Row number, from 0."""
    context: list[Message]
    """The conversation before the responses."""
    responses: list[str]
    """n responses."""
    pairs: list[tuple[int, int]]
    """(better, worse) response indices; empty if all texts or all scores are equal."""
    margins: list[float]
    """Minimum score difference of each pair."""
    subset: str | None
    """The part of the data that the row belongs to."""
    attributes: dict[str, list[float]]
    """Name → n ratings, one per response; empty without ratings. Ratings in a list are named by position."""


@dataclass(frozen=True, eq=False)
class EncodedComparison(EncodedRow):
    """A row as tokens: one sequence per response, the whole conversation as the reward model reads it."""

    pairs: list[tuple[int, int]]
    """As in `Comparison`."""
    margins: list[float]
    """As in `Comparison`."""
    subset: str | None
    """As in `Comparison`."""
    attributes: list[list[float]]
    """n lists of k ratings; k is 0 without ratings."""


def load_preferences(source: str | DataSource) -> list[Comparison]:
    """Reads all rows of a file, a folder or a Hub dataset.

    Args:
        source: Path or Hub name, or either with a split and a subset.

    Returns:
        The comparisons, in the order of the rows.

    Raises:
        UserError: The source cannot be read, lacks columns, is empty, or has invalid rows.
    """
    rows = read_table(source, lambda found: _select_columns(found, source), "preferences")
    parsed = parse_rows(source, rows, _parse)
    for (place, _), comparison in zip(rows, parsed, strict=True):
        if list(comparison.attributes) != list(parsed[0].attributes):
            raise UserError(
                f"{source}: {place} has the ratings {', '.join(comparison.attributes) or '(none)'}, but {rows[0][0]} "
                f"has {', '.join(parsed[0].attributes) or '(none)'}; use the same ratings in all rows."
            )
    return parsed


def _select_columns(found: Sequence[str], source: str | DataSource) -> list[str]:
    if not (set(_PAIR) <= set(found) or set(_SCORED) <= set(found)):
        raise UserError(
            f"{source} has neither the columns {' and '.join(map(repr, _PAIR))} nor {', '.join(map(repr, _SCORED))}, "
            f"only {', '.join(map(repr, found))}; rename them."
        )
    one_sided = {"chosen_attributes", "rejected_attributes"}.intersection(found)
    if len(one_sided) == 1:
        raise UserError(f"{source} has a column {one_sided.pop()!r} alone; rate both responses, or remove it.")
    return [name for name in COLUMNS if name in found]


def _parse(index: int, cells: Cells) -> Comparison:
    subset = None if cells.get("subset") is None else str(cells["subset"])
    if cells.get("chosen") is None and cells.get("responses") is not None:
        return _parse_scored(index, cells, subset)
    context, chosen, rejected = _parse_pair(cells)
    margin = _number(cells["margin"], "`margin`") if "margin" in cells else 0.0
    if margin < 0:
        raise ValueError(f"`margin` is {margin:g}; it must not be negative")
    ratings = [
        _ratings(cells[name], f"`{name}`") for name in ("chosen_attributes", "rejected_attributes") if name in cells
    ]
    pairs = [] if chosen.strip() == rejected.strip() else [(0, 1)]
    return Comparison(
        index, context, [chosen, rejected], pairs, [margin] * len(pairs), subset, _ratings_by_name(ratings)
    )


def _parse_scored(index: int, cells: Cells, subset: str | None) -> Comparison:
    context = prompt_messages(cells.get("prompt"))
    responses = [_response(text, f"response {n}") for n, text in enumerate(_list(cells, "responses"), start=1)]
    scores = [_number(score, f"score {n}") for n, score in enumerate(_list(cells, "scores"), start=1)]
    ratings = []
    if "attributes" in cells:
        ratings = [_ratings(cell, f"attributes {n}") for n, cell in enumerate(_list(cells, "attributes"), start=1)]
    for name, values in (("scores", scores), ("attributes", ratings)):
        if values and len(values) != len(responses):
            raise ValueError(f"there are {len(responses)} responses and {len(values)} {name}")
    texts = [response.strip() for response in responses]
    pairs = [(i, j) for i, j in permutations(range(len(texts)), 2) if scores[i] > scores[j] and texts[i] != texts[j]]
    return Comparison(index, context, responses, pairs, [0.0] * len(pairs), subset, _ratings_by_name(ratings))


def _parse_pair(cells: Cells) -> tuple[list[Message], str, str]:
    """The conversation before the responses, and both responses."""
    chosen, rejected = cells["chosen"], cells["rejected"]
    decoded = decode_messages(chosen), decode_messages(rejected)
    if all(isinstance(cell, list) for cell in decoded):  # a single one is a response that happens to be such a list
        chosen, rejected = decoded
    if isinstance(chosen, list) and isinstance(rejected, list):
        before, good = _response_from_chat(chosen, "chosen", cells)
        other, bad = _response_from_chat(rejected, "rejected", cells)
        if before != other:
            raise ValueError("`chosen` and `rejected` answer different conversations")
        return before, good, bad
    if isinstance(chosen, list) or isinstance(rejected, list):
        raise ValueError("one of `chosen` and `rejected` is a list of messages and the other is not")
    context = prompt_messages(cells.get("prompt"))
    return context, _response(chosen, "`chosen`"), _response(rejected, "`rejected`")


def _response_from_chat(turns: list[object], name: str, cells: Cells) -> tuple[list[Message], str]:
    """The conversation before the response, and the response, from a list of messages."""
    try:
        messages = to_conversation(turns)
        if len(messages) == 1 and messages[0]["role"] == "assistant":
            context = prompt_messages(cells.get("prompt"))
        else:
            check_turns(messages)
            context = messages[:-1]
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from error
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"`{name}` ends with a user turn; the last turn must be a response")
    return context, _response(messages[-1]["content"], f"`{name}`")


def _response(text: object, where: str) -> str:
    if problem := text_problem(text):
        raise ValueError(f"{where} {problem}")
    if "<think>" in str(text) or "</think>" in str(text):
        raise ValueError(f"{where} contains a thought, which a reward model must not see; use only the response")
    return str(text)


def _list(cells: Cells, name: str) -> list[object]:
    cell = cells.get(name)
    if not isinstance(cell, list):
        raise ValueError(f"`{name}` is {type_name(cell)}, not a list")
    return cell


def _number(cell: object, where: str) -> float:
    try:
        number = float(cell)  # type: ignore[arg-type]  # CSV cells are text
    except (TypeError, ValueError):
        raise ValueError(f"{where} is {type_name(cell)}, not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{where} is {number}, not a finite number")
    return number


def _ratings(cell: object, where: str) -> dict[str, float]:
    if isinstance(cell, list):
        named = [(str(position), rating) for position, rating in enumerate(cell, start=1)]
    elif isinstance(cell, Mapping):
        named = sorted(cell.items())
    else:
        raise ValueError(f"{where} is {type_name(cell)}, not a list of numbers or an object of names and numbers")
    if not named:
        raise ValueError(f"{where} is empty")
    return {name: _number(rating, f"{where} {name}") for name, rating in named}


def _ratings_by_name(ratings: list[dict[str, float]]) -> dict[str, list[float]]:
    if any(set(rating) != set(ratings[0]) for rating in ratings):
        raise ValueError("the responses are rated by different attributes")
    return {name: [rating[name] for rating in ratings] for name in (ratings[0] if ratings else ())}


class PreferenceDataModule(SupervisedDataModule[EncodedComparison]):
    """Preference data, encoded as the reward model reads it.

    Args:
        path: File (.parquet, .jsonl, .json, .csv), folder or Hub dataset; `rlmt.data.preferences` lists its columns.
        batch_size: Rows per optimizer step, over all ranks.
        max_length: Maximum tokens of a conversation. Rows with a longer one are dropped; their number is logged.
        **options: Options of `SupervisedDataModule`.

    Raises:
        UserError: An argument is out of range.
    """

    row_noun = "comparisons"

    def __init__(self, path: str, batch_size: PositiveInt = 64, max_length: PositiveInt = 4096, **options: Any) -> None:
        super().__init__(path, batch_size, max_length, **options)

    @property
    def attributes(self) -> int:
        """Number of ratings per response in the training rows."""
        return len(self.train_rows[0].attributes[0]) if self.train_rows else 0

    @property
    def subsets(self) -> list[str]:
        """Names of the subsets in the validation rows."""
        return sorted({row.subset for row in self.val_rows if row.subset is not None})

    def read(self, source: DataSource, module: Any) -> list[EncodedComparison]:
        """Reads the rows of a source and encodes their conversations with the module's reader."""
        rows = load_preferences(source)
        differing = [row for row in rows if row.pairs]
        if not differing:
            raise UserError(
                f"{source}: the responses are equal in all {len(rows):,} rows; use rows with a preferred response."
            )
        if len(differing) < len(rows):
            equal = len(rows) - len(differing)
            rank_zero_info(f"dropped {equal:,} of {len(rows):,} rows whose responses are equal ({source})")
        return [self._encode(row, source, module) for row in differing]

    def _encode(self, row: Comparison, source: DataSource, module: Any) -> EncodedComparison:
        """Renders and encodes the conversation of each response."""
        try:
            texts = [module.reader.render(row.context, response) for response in row.responses]
        except UserError as error:
            raise UserError(f"{source}: row {row.index + 1}: {error}") from error
        sequences = [torch.tensor(ids, dtype=torch.int32) for ids in module.reader.encode(texts)]
        attributes = [list(ratings) for ratings in zip(*row.attributes.values(), strict=True)]
        return EncodedComparison(
            row.index, sequences, row.pairs, row.margins, row.subset, attributes or [[] for _ in sequences]
        )
