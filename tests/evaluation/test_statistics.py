"""Bootstrap intervals, against closed forms, a slow bootstrap in plain Python, and their coverage of a known value."""

import json
import math
import random
import statistics

import numpy as np
import pytest
from scipy.stats import norm, t

from rlmt.evaluation.statistics import (
    Interval,
    bootstrap,
    bootstrap_mean,
    interval,
    paired_difference,
    resample_means,
)


def test_interval_of_a_mean_equals_that_of_student() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=40)
    found = bootstrap_mean(values)
    half = t.ppf(0.975, 39) * values.std(ddof=1) / math.sqrt(40)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.06)
    assert found.high == pytest.approx(values.mean() + half, abs=0.06)


def test_tails_are_widened_as_in_the_formula() -> None:
    samples = norm.ppf((np.arange(1_000_000) + 0.5) / 1_000_000)  # a standard normal distribution without noise
    for groups in (5, 20, 1000):
        expected = math.sqrt(groups / (groups - 1)) * t.ppf(0.975, groups - 1)
        assert interval(0.0, samples, groups).high == pytest.approx(expected, abs=2e-3)
        assert interval(0.0, samples, groups).low == pytest.approx(-expected, abs=2e-3)


def test_means_of_groups_equal_a_slow_bootstrap() -> None:
    generator = random.Random(1)
    rows = [(f"g{generator.randrange(12)}", generator.choice([0.0, 0.5, 1.0, math.nan])) for _ in range(60)]
    groups, values = [row[0] for row in rows], [row[1] for row in rows]
    names = sorted(set(groups))
    choices = np.random.default_rng(5).integers(len(names), size=(2000, len(names)))
    slow = []
    for chosen in choices:
        taken = [v for number in chosen for g, v in rows if g == names[number] and not math.isnan(v)]
        slow.append(statistics.fmean(taken))
    assert resample_means(values, groups, seed=5) == pytest.approx(np.array(slow))


def test_function_of_rows_receives_whole_groups() -> None:
    values, groups = np.array([0.0, 1.0, 4.0, 9.0, 2.0]), ["b", "a", "b", "c", "a"]
    seen = []

    def figures(rows: np.ndarray) -> list[float]:
        seen.append(sorted(groups[row] for row in rows))
        return [values[rows].mean(), float(np.median(values[rows]))]

    mean, median = bootstrap(figures, groups, resamples=500, seed=3)
    assert seen[0] == sorted(groups) and len(seen) == 501
    assert all(names.count("a") % 2 == 0 and names.count("b") % 2 == 0 for names in seen)
    assert mean.value == pytest.approx(3.2) and median.value == 2.0
    assert mean == interval(3.2, resample_means(values, groups, resamples=500, seed=3), 3)


def test_difference_is_paired() -> None:
    generator = np.random.default_rng(2)
    difficulty = generator.normal(0.0, 10.0, size=100)
    second = difficulty + generator.normal(0.0, 0.1, size=100)
    found = paired_difference(difficulty + 1.0, second)
    assert found.low > 0.9 and found.high < 1.1
    assert bootstrap_mean(second).high - bootstrap_mean(second).low > 2.0


def test_missing_scores_are_left_out() -> None:
    found = bootstrap_mean([1.0, math.nan, 3.0])
    assert found.value == 2.0
    assert paired_difference([1.0, 2.0, math.nan], [0.0, math.nan, 5.0]).value == 1.0
    assert math.isnan(bootstrap_mean([math.nan, math.nan]).value) and math.isnan(bootstrap_mean([]).low)


def test_single_group_has_no_interval() -> None:
    found = bootstrap_mean([1.0, 2.0], ["a", "a"])
    assert found.value == 1.5 and math.isnan(found.low) and math.isnan(found.high)


def test_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(0).random(50)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("prompts", "rate"), [pytest.param(20, 0.5, marks=SLOW), (60, 0.3), pytest.param(200, 0.8, marks=SLOW)]
)
def test_intervals_of_win_rates_cover_the_true_rate(prompts: int, rate: float) -> None:
    generator = np.random.default_rng(prompts)
    covered = 0
    for seed in range(200):
        found = bootstrap_mean(generator.random(prompts) < rate, seed=seed)
        covered += found.low <= rate <= found.high
    assert 0.92 <= covered / 200 <= 0.98


def test_intervals_of_grouped_rows_cover_and_those_of_single_rows_do_not() -> None:
    generator = np.random.default_rng(7)
    groups = np.repeat(np.arange(40), 3).tolist()
    covered = [0, 0]
    for seed in range(200):  # a standard error of 1.5 %
        rows = np.repeat(generator.normal(size=40), 3) + 0.3 * generator.normal(size=120)
        for place, found in enumerate((bootstrap_mean(rows, groups, seed=seed), bootstrap_mean(rows, seed=seed))):
            covered[place] += found.low <= 0 <= found.high
    assert 0.92 <= covered[0] / 200 <= 0.98
    assert covered[1] / 200 < 0.85


def test_interval_is_printed_and_read_back() -> None:
    found = Interval(0.5417, 0.481, 0.6031)
    assert found.format(scale=100) == "54.2 [48.1, 60.3]"
    assert found.format(digits=2, sign=True) == "+0.54 [+0.48, +0.60]"
    assert Interval.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert Interval(1.0, math.nan, math.nan).to_json() == {"value": 1.0, "low": None, "high": None}
