"""The seam of benchmarks: items to answer, questions to a judge, scores, and the figures computed from them.

A benchmark sees responses only. The pipeline generates completions, splits them with the policy's own thinking format,
and gives malformed ones the benchmark's `failure` value without asking a judge.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from rlmt.types import Message

Scoring = Literal["ours", "authors"]
"""`ours` mends the defects of the paper's evaluation code; `authors` repeats them, to compare with its values."""


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark."""

    id: str
    """Unique within the benchmark, stable over versions of its file."""
    messages: list[Message]
    """The conversation that the policy answers, a user's turn last."""
    data: dict[str, Any] = field(default_factory=dict)
    """What scoring needs, as JSON values: a reference answer, a checklist, instruction ids."""
    group: str = ""
    """Items with the same group are resampled together in the bootstrap; empty: the item is a group by itself."""


@dataclass(frozen=True)
class Question:
    """One request to a judge."""

    messages: list[Message]
    """System and user turns."""
    max_tokens: int
    """Maximum length of the answer in tokens."""
    temperature: float = 0.0
    """Sampling temperature of the judge."""


@dataclass(frozen=True)
class Score:
    """The score of one response."""

    value: float
    """In the unit of the figures, such as 0 to 100; higher is better."""
    parsed: bool = True
    """Whether the judge's answers could be read. `value` of an unparsed score is what `scoring` prescribes; figures
    leave unparsed scores out under `ours` and take them at their value under `authors`."""
    weight: float = 1.0
    """Weight in the mean over rows: Arena-Hard counts a clear verdict as three."""


@dataclass(frozen=True)
class Row:
    """One item with a model's response and its score: the input of the figures."""

    item: Item
    response: str
    """The response without the thought; empty for malformed output."""
    score: Score
    malformed: bool = False
    """Whether the output was malformed, so that the score is the benchmark's failure value."""


class Benchmark(ABC):
    """A benchmark: loads its items, asks a judge or applies a rule, and computes figures.

    Args:
        scoring: Whose rules hold; see `Scoring`.
    """

    name: ClassVar[str]
    """Name on the command line and in files, such as alpaca_eval."""
    title: ClassVar[str]
    """Name in tables, such as AlpacaEval 2."""
    source: ClassVar[str]
    """Hub dataset that `load` reads (owner/name), or the URL (https://...) of the page to download its files from."""
    figures: ClassVar[tuple[str, ...]]
    """Names of the figures; the first is the one that the paper's table shows."""
    chat: ClassVar[bool] = False
    """Whether the benchmark counts towards the average of chat benchmarks."""
    judge: ClassVar[str | None] = None
    """Model that the paper's evaluation uses as judge; None: a rule scores."""
    baseline: ClassVar[str | None] = None
    """Model whose responses are compared with, if any."""
    failure: ClassVar[float] = 0.0
    """Score of malformed output."""
    failure_weight: ClassVar[float] = 1.0
    """Weight of malformed output under `ours`: that of a response that loses clearly."""

    def __init__(self, scoring: Scoring = "ours") -> None:
        self.scoring = scoring

    @abstractmethod
    def load(self, path: str) -> list[Item]:
        """Reads the items.

        Args:
            path: File, or folder where the data are several files; or `source` if that is a Hub dataset.

        Raises:
            UserError: It cannot be read, or lacks a column.
        """

    def check(self, items: Sequence[Item] = ()) -> None:
        """Checks what scoring needs, such as packages and their data, before anything is generated.

        Args:
            items: The loaded items, to check that they can be scored.

        Raises:
            UserError: Something is missing; the message has the line that installs it.
        """

    def questions(self, item: Item, response: str) -> list[Question]:
        """The questions to the judge about a response; none if a rule scores."""
        return []

    @abstractmethod
    def score(self, item: Item, response: str, answers: Sequence[str]) -> Score:
        """The score of a well-formed response.

        Args:
            item: The item.
            response: The response, without the thought.
            answers: The judge's answers to `questions`, in their order; "" for one that was refused or cut off.
        """

    def compute(self, rows: Sequence[Row]) -> dict[str, float]:
        """The figures by name, in the order of `figures`; nan where rows do not determine one.

        By default the only figure, the weighted mean of the scores.

        Args:
            rows: At least one row; in a resample, a row can occur several times.
        """
        (figure,) = self.figures
        return {figure: self.mean(rows)}

    def counted(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that figures are computed from: `ours` leaves unparsed scores out."""
        return [row for row in rows if row.score.parsed or self.scoring == "authors"]

    def mean(self, rows: Sequence[Row]) -> float:
        """The weighted mean of the counted scores; nan if there is none."""
        scores = [row.score for row in self.counted(rows)]
        total = sum(score.weight for score in scores)
        return sum(score.weight * score.value for score in scores) / total if total else math.nan
