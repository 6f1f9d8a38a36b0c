"""PopQA: short questions about rare entities (https://arxiv.org/abs/2212.10511)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlmt.data.tables import Cells
from rlmt.evaluation.benchmark import Benchmark, Item, Score
from rlmt.evaluation.benchmarks.common import json_cell, read_items, text_cell
from rlmt.types import Message

PROMPT = (
    "Please answer the following question by generating a short snippet with a few sentences. You should not exceed "
    "100 words in your response. Do not output any other text or comments.\n\n"
)


class PopQA(Benchmark):
    """100 if the response contains one of the answer's aliases.

    `ours`: an alias as whole words, in upper or lower case. `authors`: an alias anywhere in the response, within words
    too, in one of four spellings: with the alias pol, every police officer is a politician.
    """

    name = "popqa"
    title = "PopQA"
    source = "akariasai/PopQA"
    figures = ("accuracy",)

    def load(self, path: str) -> list[Item]:
        """See `Benchmark.load`."""
        return read_items(self, path, ("id", "question", "possible_answers"), _parse)

    def score(self, item: Item, response: str, answers: Sequence[str]) -> Score:
        """See `Benchmark.score`."""
        matches = _within if self.scoring == "authors" else _as_words
        return Score(100.0 * any(matches(alias, response) for alias in item.data["aliases"]))


def _parse(index: int, cells: Cells) -> Item:
    aliases = json_cell(cells, "possible_answers", list)
    if not aliases or not all(isinstance(alias, str) and alias.strip() for alias in aliases):
        raise ValueError("`possible_answers` is not a list of texts")
    prompt = PROMPT + text_cell(cells, "question")
    return Item(str(cells["id"]), [Message(role="user", content=prompt)], {"aliases": aliases})


def _as_words(alias: str, response: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(alias.strip().casefold())}(?!\w)", response.casefold()) is not None


def _within(alias: str, response: str) -> bool:
    return any(spelling in response for spelling in (alias, alias.lower(), alias.upper(), alias.capitalize()))
