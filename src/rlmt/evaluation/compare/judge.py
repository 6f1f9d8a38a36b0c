"""Questions to a judge about pairs of responses, in both orders, and what its verdicts say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlmt.errors import UserError
from rlmt.evaluation.benchmark import Question
from rlmt.evaluation.compare.pairs import LOSS, TIE, WIN, Pair
from rlmt.evaluation.statistics import Floats
from rlmt.rewards.pairwise import POINTS
from rlmt.rewards.prompt_text import fill_template, placeholders
from rlmt.rewards.verdicts import word_at_end
from rlmt.types import Message

RESPONSES = ("response_a", "response_b")
"""Names in the template that stand for the responses."""


@dataclass(frozen=True)
class JudgeQuestion:
    """How a judge is asked.

    Args:
        template: The question. `{prompt}`, `{response_a}`, `{response_b}` and names of columns in braces are replaced.
            An answer ends with a line `Winner: A`, `Winner: B` or `Winner: tie`.
        max_tokens: Maximum length of an answer in tokens, hidden thinking included.
        temperature: Sampling temperature of the judge.
    """

    template: str
    max_tokens: int
    temperature: float

    def check(self) -> None:
        """Raises UserError if the template lacks a response."""
        for name in RESPONSES:
            if name not in placeholders(self.template):
                raise UserError(f"--template does not contain {{{name}}}; add it.")

    @property
    def columns(self) -> list[str]:
        """Columns of the prompt set in the template."""
        return sorted(placeholders(self.template).difference(RESPONSES, ("prompt",)))

    def ask(self, pair: Pair) -> list[Question]:
        """Two questions, A's response first and B's first; none about malformed or equal responses."""
        texts = (pair.first.response, pair.second.response)
        if not pair.well_formed or texts[0] == texts[1]:
            return []
        return [self._question(pair, *texts), self._question(pair, *reversed(texts))]

    def _question(self, pair: Pair, first: str, second: str) -> Question:
        text = fill_template(self.template, pair.prompt, dict(zip(RESPONSES, (first, second), strict=True)), "judge")
        return Question([Message(role="user", content=text)], self.max_tokens, self.temperature)


def read_verdict(text: str) -> str | None:
    """The response that an answer prefers: `a` (the first one), `b`, `tie`; None if it has no verdict."""
    return word_at_end(text, "Winner", tuple(POINTS))


@dataclass(frozen=True)
class Verdicts:
    """The verdicts on the well-formed pairs."""

    orders: list[tuple[str | None, str | None]]
    """The verdicts of each pair with A's response first and with B's first, `a` being the response shown first; None
    where none can be read. Equal responses have two ties."""

    @property
    def points(self) -> Floats:
        """[n] Points of A: a win counts if the same response wins in both orders; nan without both verdicts."""
        agreed: dict[tuple[str | None, str | None], float] = {("a", "b"): WIN, ("b", "a"): LOSS}
        return np.array([math.nan if None in pair else agreed.get(pair, TIE) for pair in self.orders])

    @property
    def consistency(self) -> float:
        """Share of pairs with two verdicts that name the same winner, or a tie, in both orders."""
        both = [pair for pair in self.orders if None not in pair]
        return sum(pair in (("a", "b"), ("b", "a"), ("tie", "tie")) for pair in both) / len(both) if both else math.nan

    @property
    def first_share(self) -> float:
        """Share of the verdicts for one response that are for the one shown first; nan if all are ties."""
        found = [verdict for pair in self.orders for verdict in pair if verdict in ("a", "b")]
        return found.count("a") / len(found) if found else math.nan


def collect(pairs: Sequence[Pair], verdicts: Sequence[str | None], question: JudgeQuestion) -> Verdicts:
    """Assigns verdicts to pairs.

    Args:
        pairs: The pairs that the questions were about.
        verdicts: The verdict on each question, in order.
        question: How the judge was asked.

    Returns:
        The verdicts on the well-formed pairs, in their order.
    """
    found = iter(verdicts)
    orders: list[tuple[str | None, str | None]] = []
    for pair in pairs:
        if pair.well_formed:
            orders.append((next(found), next(found)) if question.ask(pair) else ("tie", "tie"))
    return Verdicts(orders)
