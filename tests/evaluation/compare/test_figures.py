"""Points, figures, ranking and sentences of a comparison, against values computed by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from rlmt.evaluation.compare.figures import compute_figures, judge_line, reward_line, sentences
from rlmt.evaluation.compare.judge import Verdicts
from rlmt.evaluation.compare.pairs import Pair
from rlmt.evaluation.compare.report import Comparison, cells, closing_sentences, markdown, terminal_table
from rlmt.evaluation.statistics import Interval
from rlmt.types import Prompt, Split, Status

NAMES = ("new", "old")


def pair(index: int, first: str | None, second: str | None, prompt: str = "Hi") -> Pair:
    """A pair; None is a malformed completion."""
    splits = [
        Split("thought", text or "", Status.OK if text is not None else Status.UNCLOSED) for text in (first, second)
    ]
    return Pair(Prompt(index, [{"role": "user", "content": f"{prompt} {index}"}]), *splits)


def test_malformed_loses_against_well_formed_and_ties_with_malformed() -> None:
    pairs = [pair(0, "a", None), pair(1, None, "b"), pair(2, None, None), pair(3, "a", "b")]
    line = judge_line("judge", pairs, Verdicts([("b", "a")]))
    assert line.points.tolist() == [1.0, 0.0, 0.5, 0.0]
    scores = (np.array([math.nan, math.nan, math.nan, 2.0]), np.array([math.nan, math.nan, math.nan, 1.0]))
    assert reward_line("reward", pairs, scores).points.tolist() == [1.0, 0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("orders", "points", "consistent"),
    [
        (("a", "b"), 1.0, True),  # A's response wins first and last
        (("b", "a"), 0.0, True),
        (("tie", "tie"), 0.5, True),
        (("a", "a"), 0.5, False),  # the response shown first wins, whichever it is
        (("b", "b"), 0.5, False),
        (("a", "tie"), 0.5, False),
        (("tie", "a"), 0.5, False),
    ],
)
def test_win_counts_in_both_orders_only(orders: tuple[str, str], points: float, consistent: bool) -> None:
    verdicts = Verdicts([orders])
    assert verdicts.points.tolist() == [points]
    assert verdicts.consistency == float(consistent)


def test_pair_without_both_verdicts_is_left_out_and_counted() -> None:
    pairs = [pair(0, "a", "b"), pair(1, "a", "b"), pair(2, "a", "b")]
    verdicts = Verdicts([("a", "b"), ("a", None), (None, None)])
    figures = compute_figures(judge_line("judge", pairs, verdicts), pairs, 0)
    assert (figures.pairs, figures.unparsed, figures.wins, figures.win_rate.value) == (1, 2, 1.0, 1.0)
    assert verdicts.consistency == 1.0 and verdicts.first_share == pytest.approx(2 / 3)


def test_figures_of_a_reward_are_means_over_scored_pairs() -> None:
    pairs = [pair(n, "a", "b") for n in range(3)] + [pair(3, None, "b")]
    scores = (np.array([3.0, 1.0, 2.0, math.nan]), np.array([1.0, 1.0, 3.0, math.nan]))
    figures = compute_figures(reward_line("reward", pairs, scores), pairs, 0)
    assert (figures.wins, figures.ties, figures.losses) == (0.25, 0.25, 0.5)
    assert figures.win_rate.value == pytest.approx(0.375)
    assert figures.means == (2.0, pytest.approx(5 / 3)) and figures.difference is not None
    assert figures.difference.value == pytest.approx(1 / 3)
    assert figures.consistency is None and figures.first_share is None


def test_longer_responses_that_win_by_length_alone_lose_their_win_rate() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(10, 400, size=(400, 2)) + np.array([150, 0])  # A writes more
    pairs = [pair(n, "x" * int(one), "x" * int(other)) for n, (one, other) in enumerate(lengths)]
    longer = generator.random(400) < 1 / (1 + np.exp(-(lengths[:, 0] - lengths[:, 1]) / 60))
    verdicts = Verdicts([("a", "b") if wins else ("b", "a") for wins in longer])
    figures = compute_figures(judge_line("judge", pairs, verdicts), pairs, 0)
    assert figures.win_rate.low > 0.7
    assert figures.length_controlled.low < 0.5 < figures.length_controlled.high


def test_judge_that_always_answers_a_is_exposed_in_words() -> None:
    pairs = [pair(n, "a", "b") for n in range(20)]
    figures = compute_figures(judge_line("judge", pairs, Verdicts([("a", "a")] * 20)), pairs, 0)
    assert (figures.wins, figures.ties, figures.losses, figures.consistency, figures.first_share) == (0, 1, 0, 0, 1)
    text = " ".join(sentences(figures, NAMES))
    assert "the same in both orders in 0.0 % of the pairs" in text
    assert "prefers the response that it is shown first (100.0 % of its choices): do not trust its result" in text


@pytest.mark.parametrize(
    ("wins", "words"),
    [(90, "new is better than old"), (10, "new is worse than old"), (50, "no difference is shown")],
)
def test_sentence_says_what_the_interval_shows(wins: int, words: str) -> None:
    pairs = [pair(n, "a", "b") for n in range(100)]
    verdicts = Verdicts([("a", "b")] * wins + [("b", "a")] * (100 - wins))
    text = " ".join(sentences(compute_figures(judge_line("judge", pairs, verdicts), pairs, 0), NAMES))
    assert words in text and "do not trust" not in text


def comparison() -> Comparison:
    pairs = [pair(n, f"answer | {n}", f"other ```` {n}", prompt="line\none") for n in range(4)] + [pair(4, None, "b")]
    scores = (np.array([1.0, 5.0, 0.0, 2.0, math.nan]), np.array([1.0, 1.0, 4.0, 1.0, math.nan]))
    lines = [
        judge_line("judge", pairs, Verdicts([("a", "b"), ("tie", "tie"), ("a", "a"), ("a", "b")])),
        reward_line("re|ward", pairs, scores),
    ]
    return Comparison(NAMES, pairs, lines, [compute_figures(line, pairs, 0) for line in lines], {})


def test_terminal_of_80_columns_shows_every_figure_and_bracket(capsys: pytest.CaptureFixture[str]) -> None:
    found = replace(comparison(), names=("new [a]", "old"))
    Console(width=80).print(terminal_table(found))
    printed = capsys.readouterr().out
    assert "new [a] wins" in printed and "win rate of new [a] [95 %]" in printed
    assert all(cell in printed for figures in found.figures for cell in cells(figures))


def test_most_won_and_lost_are_ranked_by_the_first_line_and_then_the_next() -> None:
    won, lost = comparison().most(10)
    assert won == [3, 0, 1]  # 3 and 0 by the judge, 3 by more of the reward; 1 by the reward alone
    assert lost == [2]  # the malformed one is counted, not listed


def test_report_shows_both_responses_as_they_are() -> None:
    found = comparison()
    text = markdown(found)
    assert "### Row 4" in text and "judge: new wins; re|ward: new wins (2.00 against 1.00)" in text
    assert "`````text\nother ```` 3\n`````" in text and "```text\nanswer | 3\n```" in text
    assert "| re\\|ward |" in text
    assert "Malformed of 5: new 1, old 0." in " ".join(closing_sentences(found)) and "none is judged" in text


def test_figures_become_json() -> None:
    values = [figures.to_json() for figures in comparison().figures]
    assert values[0]["win_rate"]["value"] == pytest.approx(0.6) and values[0]["means"] is None
    assert Interval.from_json(values[1]["difference"]).value == pytest.approx(0.25)
