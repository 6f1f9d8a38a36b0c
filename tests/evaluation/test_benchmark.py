"""The seam of benchmarks: the default figure, and what `scoring` counts."""

import math
from collections.abc import Sequence

import pytest

from rlmt.evaluation.benchmark import Benchmark, Item, Row, Score, Scoring


class Constant(Benchmark):
    name = "constant"
    title = "Constant"
    source = "owner/constant"
    figures = ("accuracy",)

    def load(self, path: str) -> list[Item]:
        return [Item("1", [])]

    def score(self, item: Item, response: str, answers: Sequence[str]) -> Score:
        return Score(1.0)


def rows(*scores: Score) -> list[Row]:
    return [Row(Item(str(n), []), "text", score) for n, score in enumerate(scores)]


@pytest.mark.parametrize(("scoring", "expected"), [("ours", (3 * 100 + 20) / 4), ("authors", (3 * 100 + 20 + 0) / 5)])
def test_figure_is_the_weighted_mean_of_what_scoring_counts(scoring: Scoring, expected: float) -> None:
    given = rows(Score(100.0, weight=3.0), Score(20.0), Score(0.0, parsed=False))
    assert Constant(scoring).compute(given) == {"accuracy": expected}


def test_figure_of_unparsed_scores_alone_is_nan() -> None:
    assert math.isnan(Constant().compute(rows(Score(0.0, parsed=False)))["accuracy"])
