"""Preferences to train a reward model on: which of two or more responses to a prompt is the better one.

A row is one of two, told apart by its columns:

- `chosen` and `rejected`, both text or both lists of messages. With text, or with lists that hold nothing but the
  response's turn, `prompt` (text or a list of messages) holds the conversation before them; longer lists hold it
  themselves. Optional: `margin`, a number by which the chosen response should win; `chosen_attributes` and
  `rejected_attributes`, ratings.
- `prompt`, `responses` (a list of texts) and `scores` (a number for each): all pairs whose scores differ are compared,
  and each response goes through the model once. Optional: `attributes`, ratings of each response.

Ratings are a list of numbers, or an object of names and numbers. A column `subset` names the part of the data that a
row belongs to; accuracy is told by subset. Responses that read the same teach nothing, whichever was chosen: such
pairs are dropped and counted aloud.
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
from rlmt.data.messages import check_turns, text_problem, to_conversation, type_name
from rlmt.data.supervised import EncodedRow, SupervisedDataModule
from rlmt.data.tables import Cells, parse_rows, read_table
from rlmt.errors import UserError
from rlmt.ranges import PositiveInt
from rlmt.types import Message

_PAIR = ("chosen", "rejected")
_RANKED = ("prompt", "responses", "scores")
COLUMNS = (*_PAIR, *_RANKED, "margin", "subset", "chosen_attributes", "rejected_attributes", "attributes")
"""The columns that are read."""


@dataclass(frozen=True)
class Comparison:
    """One row: some responses to one prompt."""

    index: int
    """Row number, from 0."""
    context: list[Message]
    """The conversation before the responses."""
    responses: list[str]
    """n responses."""
    pairs: list[tuple[int, int]]
    """Which response is better than which; none where all read or score the same."""
    margins: list[float]
    """By how much at least, for each pair."""
    subset: str | None
    """Which part of the data the row belongs to."""
    attributes: dict[str, list[float]]
    """Name → n ratings, one a response; empty without ratings. Names of a list are its positions."""


@dataclass(frozen=True, eq=False)
class EncodedComparison(EncodedRow):
    """A row as tokens: one sequence a response, the whole conversation as the reward model reads it."""

    pairs: list[tuple[int, int]]
    """As in `Comparison`."""
    margins: list[float]
    """As in `Comparison`."""
    subset: str | None
    """As in `Comparison`."""
    attributes: list[list[float]]
    """n lists of k ratings; k is 0 without."""


def load_preferences(source: str) -> list[Comparison]:
    """Reads all rows of a file or a hub data set.

    Args:
        source: path or hub name.

    Raises:
        UserError: the source cannot be read, lacks columns, is empty, or holds bad rows.
    """
    rows = read_table(source, lambda found: _choose(found, source), "preferences")
    parsed = parse_rows(source, rows, _parse)
    for (place, _), comparison in zip(rows, parsed, strict=True):
        if list(comparison.attributes) != list(parsed[0].attributes):
            raise UserError(
                f"{source}: {place}: has ratings of {', '.join(comparison.attributes) or 'nothing'} where {rows[0][0]} "
                f"has {', '.join(parsed[0].attributes) or 'none'}: give all rows the same"
            )
    return parsed


def _choose(found: Sequence[str], source: str) -> list[str]:
    if not (set(_PAIR) <= set(found) or set(_RANKED) <= set(found)):
        raise UserError(
            f"{source} has neither the columns {' and '.join(map(repr, _PAIR))} nor {', '.join(map(repr, _RANKED))}, "
            f"only {', '.join(map(repr, found))}: rename them"
        )
    one_sided = {"chosen_attributes", "rejected_attributes"}.intersection(found)
    if len(one_sided) == 1:
        raise UserError(f"{source} has a column {one_sided.pop()!r} alone: rate both responses, or remove it")
    return [name for name in COLUMNS if name in found]


def _parse(index: int, cells: Cells) -> Comparison:
    subset = None if cells.get("subset") is None else str(cells["subset"])
    if cells.get("chosen") is None and cells.get("responses") is not None:
        return _parse_ranked(index, cells, subset)
    context, chosen, rejected = _pair(cells)
    margin = _number(cells["margin"], "`margin`") if "margin" in cells else 0.0
    if margin < 0:
        raise ValueError(f"`margin` is {margin:g}: by how much the chosen response wins cannot be negative")
    ratings = [
        _ratings(cells[name], f"`{name}`") for name in ("chosen_attributes", "rejected_attributes") if name in cells
    ]
    pairs = [] if chosen.strip() == rejected.strip() else [(0, 1)]
    return Comparison(index, context, [chosen, rejected], pairs, [margin] * len(pairs), subset, _by_name(ratings))


def _parse_ranked(index: int, cells: Cells, subset: str | None) -> Comparison:
    context = prompt_messages(cells.get("prompt"))
    responses = [_response(text, f"response {n}") for n, text in enumerate(_list(cells, "responses"), start=1)]
    scores = [_number(score, f"score {n}") for n, score in enumerate(_list(cells, "scores"), start=1)]
    ratings = []
    if "attributes" in cells:
        ratings = [_ratings(cell, f"attributes {n}") for n, cell in enumerate(_list(cells, "attributes"), start=1)]
    for name, values in (("scores", scores), ("attributes", ratings)):
        if values and len(values) != len(responses):
            raise ValueError(f"there are {len(responses)} responses and {len(values)} {name}")
    read = [response.strip() for response in responses]
    pairs = [(i, j) for i, j in permutations(range(len(read)), 2) if scores[i] > scores[j] and read[i] != read[j]]
    return Comparison(index, context, responses, pairs, [0.0] * len(pairs), subset, _by_name(ratings))


def _pair(cells: Cells) -> tuple[list[Message], str, str]:
    """The conversation before the responses, and both responses."""
    chosen, rejected = cells["chosen"], cells["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        before, good = _response_of_chat(chosen, "chosen", cells)
        other, bad = _response_of_chat(rejected, "rejected", cells)
        if before != other:
            raise ValueError("`chosen` and `rejected` answer different conversations")
        return before, good, bad
    if isinstance(chosen, list) or isinstance(rejected, list):
        raise ValueError("one of `chosen` and `rejected` is a list of messages, the other is not")
    context = prompt_messages(cells.get("prompt"))
    return context, _response(chosen, "`chosen`"), _response(rejected, "`rejected`")


def _response_of_chat(turns: list[object], name: str, cells: Cells) -> tuple[list[Message], str]:
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
        raise ValueError(f"`{name}` ends with a user's turn where a response must stand")
    return context, _response(messages[-1]["content"], f"`{name}`")


def _response(text: object, where: str) -> str:
    if problem := text_problem(text):
        raise ValueError(f"{where} {problem}")
    if "<think>" in str(text) or "</think>" in str(text):
        raise ValueError(f"{where} holds a thought, which a reward model must not see: give the response alone")
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


def _by_name(ratings: list[dict[str, float]]) -> dict[str, list[float]]:
    if any(set(rating) != set(ratings[0]) for rating in ratings):
        raise ValueError("the responses are rated by different attributes")
    return {name: [rating[name] for rating in ratings] for name in (ratings[0] if ratings else ())}


class PreferenceDataModule(SupervisedDataModule[EncodedComparison]):
    """Preferences, written out as the reward model that they train reads them.

    Args:
        path: file (.parquet, .jsonl, .json, .csv) or hub data set, see `rlmt.data.preferences` for its columns.
        batch_size: rows an optimizer step, over all ranks.
        max_length: rows with a longer conversation, in tokens, are dropped, and counted aloud.
        **options: those of `SupervisedDataModule`.

    Raises:
        UserError: an argument is out of range.
    """

    what = "comparisons"

    def __init__(self, path: str, batch_size: PositiveInt = 64, max_length: PositiveInt = 4096, **options: Any) -> None:
        super().__init__(path, batch_size, max_length, **options)

    @property
    def attributes(self) -> int:
        """How many ratings a response of the training rows has."""
        return len(self.train_rows[0].attributes[0]) if self.train_rows else 0

    @property
    def subsets(self) -> list[str]:
        """Names of the parts that the validation rows belong to."""
        return sorted({row.subset for row in self.val_rows if row.subset is not None})

    def read(self, source: str, module: Any) -> list[EncodedComparison]:
        """Reads the rows of a source and encodes their conversations with the module's reader."""
        rows = load_preferences(source)
        differing = [row for row in rows if row.pairs]
        if not differing:
            raise UserError(
                f"{source}: in all {len(rows):,} rows the responses are equal: nothing can be learnt of them"
            )
        if len(differing) < len(rows):
            equal = len(rows) - len(differing)
            rank_zero_info(f"dropped {equal:,} of {len(rows):,} rows whose responses are equal ({source})")
        return [self._encode(row, source, module) for row in differing]

    def _encode(self, row: Comparison, source: str, module: Any) -> EncodedComparison:
        try:
            texts = [module.reader.render(row.context, response) for response in row.responses]
        except UserError as error:
            raise UserError(f"{source}: row {row.index + 1}: {error}") from error
        sequences = [torch.tensor(ids, dtype=torch.int32) for ids in module.reader.encode(texts)]
        attributes = [list(ratings) for ratings in zip(*row.attributes.values(), strict=True)]
        return EncodedComparison(
            row.index, sequences, row.pairs, row.margins, row.subset, attributes or [[] for _ in sequences]
        )
