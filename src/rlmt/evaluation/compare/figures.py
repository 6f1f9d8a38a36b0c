"""The figures of a comparison: win rates, length control, differences of scores, and notes on how far to trust them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlmt.evaluation.compare.judge import Verdicts
from rlmt.evaluation.compare.pairs import LOSS, TIE, WIN, Pair, fill_points
from rlmt.evaluation.length_control import length_controlled_win_rate
from rlmt.evaluation.statistics import Floats, Interval, bootstrap, bootstrap_mean, paired_difference

LENGTH_RESAMPLES = 1_000
"""Resamples of length-controlled win rates, each of them a fit."""
CONSISTENT = 0.5
"""Position consistency below which a judge's result is not to be trusted."""
BIASED = 0.65
"""Share of verdicts for the response shown first, or shown last, above which a judge prefers a position."""


@dataclass(frozen=True)
class Line:
    """The result by one judge or reward."""

    name: str
    """Name in the table."""
    points: Floats
    """[n] Points of A in each pair: 1, 1/2 or 0; nan without a verdict."""
    scores: tuple[Floats, Floats] | None = None
    """[n] scores of A and of B by a reward, nan in pairs that are not well formed."""
    verdicts: Verdicts | None = None
    """Verdicts of a judge that was asked in both orders."""

    @property
    def margins(self) -> Floats:
        """[n] How much better A's response is: difference of scores, or points; nan in pairs that are not judged."""
        return self.points - TIE if self.scores is None else self.scores[0] - self.scores[1]


def judge_line(name: str, pairs: Sequence[Pair], verdicts: Verdicts) -> Line:
    """The line of a judge.

    Args:
        name: Name in the table.
        pairs: n pairs.
        verdicts: The verdicts on the well-formed ones.
    """
    return Line(name, fill_points(pairs, verdicts.points.tolist()), verdicts=verdicts)


def reward_line(name: str, pairs: Sequence[Pair], scores: tuple[Floats, Floats]) -> Line:
    """The line of a reward: the higher score wins.

    Args:
        name: Name in the table.
        pairs: n pairs.
        scores: [n] scores of A and of B.
    """
    difference = scores[0] - scores[1]
    points = np.where(np.isnan(difference), math.nan, TIE + np.sign(difference) / 2)
    judged = [float(points[number]) for number, pair in enumerate(pairs) if pair.well_formed]
    return Line(name, fill_points(pairs, judged), scores)


@dataclass(frozen=True)
class Figures:
    """What the table shows of a line."""

    name: str
    """Name of the judge or reward."""
    pairs: int
    """Pairs with a result, those by form included."""
    unparsed: int
    """Pairs left out because a verdict cannot be read."""
    wins: float
    """Share of the pairs that A wins."""
    ties: float
    """Share of ties."""
    losses: float
    """Share of the pairs that B wins."""
    win_rate: Interval
    """A's win rate, a tie being half a win."""
    length_controlled: Interval
    """A's win rate had both policies written responses of the same length; nan where that cannot be determined."""
    means: tuple[float, float] | None = None
    """Mean score of A and of B over pairs with both scores."""
    difference: Interval | None = None
    """Mean difference of the scores of A and B."""
    consistency: float | None = None
    """Share of pairs on which a judge has the same verdict in both orders."""
    first_share: float | None = None
    """Share of a judge's verdicts for one response that are for the one shown first."""

    def to_json(self) -> dict[str, Any]:
        """JSON values by name."""
        values = {name: value.to_json() if isinstance(value, Interval) else value for name, value in vars(self).items()}
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()
        }


def compute_figures(line: Line, pairs: Sequence[Pair], seed: int) -> Figures:
    """Computes the figures of a line.

    Args:
        line: The result by a judge or reward.
        pairs: n pairs.
        seed: Seed of the resamples.
    """
    known = line.points[~np.isnan(line.points)]
    shares = [float(np.mean(known == value)) if known.size else math.nan for value in (WIN, TIE, LOSS)]
    means = difference = None
    if line.scores is not None:
        difference = paired_difference(*line.scores, seed=seed)
        both = ~np.isnan(line.scores[0] - line.scores[1])
        means = (float(line.scores[0][both].mean()), float(line.scores[1][both].mean())) if both.any() else None
    verdicts = line.verdicts
    return Figures(
        name=line.name,
        pairs=known.size,
        unparsed=len(pairs) - known.size,
        wins=shares[0],
        ties=shares[1],
        losses=shares[2],
        win_rate=bootstrap_mean(line.points, seed=seed),
        length_controlled=_length_controlled(line.points, pairs, seed),
        means=means,
        difference=difference,
        consistency=None if verdicts is None else verdicts.consistency,
        first_share=None if verdicts is None else verdicts.first_share,
    )


def _length_controlled(points: Floats, pairs: Sequence[Pair], seed: int) -> Interval:
    """The length-controlled win rate; results by form are counted as they are, since no lengths explain them."""
    longer = np.array([len(pair.first.response) - len(pair.second.response) for pair in pairs], dtype=np.float64)
    well_formed = np.array([pair.well_formed for pair in pairs])
    rows = np.flatnonzero(~np.isnan(points))
    if not rows.size:
        return Interval(math.nan, math.nan, math.nan)

    def compute(chosen: NDArray[np.int64]) -> float:
        taken = rows[chosen]
        form, judged = taken[~well_formed[taken]], taken[well_formed[taken]]
        rate = length_controlled_win_rate(points[judged].tolist(), longer[judged].tolist()) if len(judged) else 0.0
        return (rate * len(judged) + float(points[form].sum())) / len(taken)

    return bootstrap(compute, range(rows.size), resamples=LENGTH_RESAMPLES, seed=seed)[0]


def sentences(figures: Figures, names: tuple[str, str]) -> list[str]:
    """What the figures of a line say in words, and whether to trust them.

    Args:
        figures: The figures.
        names: Names of A and B.
    """
    first, second = names
    rate = f"{figures.win_rate.format(scale=100)} %"
    if math.isnan(figures.win_rate.low):
        found = [f"{figures.name}: too few pairs for an interval."]
    elif figures.win_rate.low > TIE:
        found = [f"{figures.name}: {first} is better than {second}; it wins {rate}."]
    elif figures.win_rate.high < TIE:
        found = [f"{figures.name}: {first} is worse than {second}; it wins {rate}."]
    else:
        found = [f"{figures.name}: no difference is shown; {first} wins {rate}, and the interval contains 50 %."]
    if figures.consistency is not None and figures.first_share is not None:
        found += _position_sentences(figures.name, figures.consistency, figures.first_share)
    if figures.unparsed:
        found.append(f"{figures.name}: {figures.unparsed:,} pairs have no verdict that can be read and are left out.")
    return found


def _position_sentences(name: str, consistency: float, first_share: float) -> list[str]:
    """How far the verdicts of a judge depend on the order in which it sees the responses."""
    if math.isnan(consistency):
        return []
    found = [f"{name}: the verdict is the same in both orders in {100 * consistency:.1f} % of the pairs."]
    share, place = max((first_share, "first"), (1 - first_share, "last"))
    if share > BIASED:
        trust = (
            "do not trust its result, use another judge"
            if consistency < CONSISTENT
            else "a win counts in both orders only"
        )
        found.append(
            f"{name} prefers the response that it is shown {place} ({100 * share:.1f} % of its choices): {trust}."
        )
    elif consistency < CONSISTENT:
        found.append(f"{name} contradicts itself when the order changes: do not trust its result, use another judge.")
    return found
