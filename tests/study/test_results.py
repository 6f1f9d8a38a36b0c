"""Means and intervals computed by hand, and metrics of resumed runs."""

import json
import math
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import ttest_1samp

from rlmt.errors import UserError
from rlmt.report.estimates import Estimate, correct_by_holm
from rlmt.study.results import interval_over_prompts, last_values, read_resamples, read_rows


def test_students_interval_equals_manual_calculation() -> None:
    # mean 3, standard deviation sqrt(2.5), t of 4 degrees of freedom 2.7764: 2.7764 * 1.5811 / sqrt(5) = 1.9632
    estimate = Estimate((1.0, 2.0, 3.0, 4.0, 5.0))
    assert estimate.mean == 3 and estimate.interval == pytest.approx((1.0368, 4.9632), abs=1e-4)
    assert estimate.format() == "3.0 ± 2.0"
    assert Estimate((2.25,)).interval is None and Estimate((2.25,)).format(2) == "2.25"


def test_interval_equals_published_interval() -> None:
    """Six differences with mean 9.2; the interval from 6.4 to 11.9 was computed independently."""
    estimate = Estimate((10.1, 9.0, 12.1, 10.9, 8.4, 4.6))
    assert estimate.interval is not None and [round(bound, 1) for bound in estimate.interval] == [6.4, 11.9]


def test_differences_are_paired_by_seed() -> None:
    one, other = Estimate((10.0, 20.0, 30.0)), Estimate((9.0, 18.0, 29.0))
    assert one.minus(other).values == (1.0, 2.0, 1.0)
    interval = one.minus(other).interval
    assert interval is not None and interval[0] > -0.2  # pairing removes the variance between seeds


def test_p_value_is_that_of_a_t_test() -> None:
    assert Estimate((10.1, 9.0, 12.1, 10.9, 8.4, 4.6)).p_value == pytest.approx(
        ttest_1samp([10.1, 9.0, 12.1, 10.9, 8.4, 4.6], 0).pvalue
    )
    assert Estimate((1.0,)).p_value is None
    assert Estimate((0.0, 0.0)).p_value == 1 and Estimate((2.0, 2.0)).p_value == 0


def test_correction_by_holm_equals_manual_calculation() -> None:
    # Sorted: 0.005 · 4 = 0.02, 0.01 · 3 = 0.03, 0.03 · 2 = 0.06, then 0.04 · 1 = 0.04, raised to the one before.
    assert correct_by_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct_by_holm([0.4, 0.9]) == [0.8, 0.9] and correct_by_holm([0.6, 0.7]) == [1.0, 1.0]
    assert correct_by_holm([]) == [] and correct_by_holm([0.3]) == [0.3]


def test_correction_bounds_the_share_of_families_with_a_false_finding() -> None:
    """Ten true null hypotheses, with shared noise: at most 5 % of the families have a corrected p-value below 0.05."""
    uniform = random.Random(0)
    false = 0
    for _ in range(4000):
        shared = uniform.gauss(0, 1)
        scores = [0.6 * shared + 0.8 * uniform.gauss(0, 1) for _ in range(10)]
        false += min(correct_by_holm([math.erfc(abs(z) / math.sqrt(2)) for z in scores])) < 0.05
    assert 0.02 < false / 4000 <= 0.055


def write_metrics(folder: Path, version: int, text: str) -> None:
    path = folder / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_steps_logged_again_by_a_resumed_run_count_once(tmp_path: Path) -> None:
    write_metrics(tmp_path, 9, "step,a,val/b\n0,1,\n1,2,\n1,,5\n2,3,\n")
    write_metrics(tmp_path, 10, "step,a,val/b\n2,30,\n3,40,\n3,,50\n")
    rows = read_rows(tmp_path)
    assert [(row["step"], row["a"]) for row in rows if "a" in row] == [(0, 1), (1, 2), (2, 30), (3, 40)]
    assert last_values(rows, {"b": "val/b"}, tmp_path) == {"b": 50}


def test_scores_of_an_evaluation_are_read_and_averaged(tmp_path: Path) -> None:
    """Two benchmarks of 3 and 1 items: 10.0 and 40.0 average to 25; one of four items is malformed."""

    def write(benchmark: str, n: int, chat: bool, malformed: int, tokens: float, **figures: float | None) -> None:
        result = {"benchmark": benchmark, "n": n, "chat": chat, "malformed": malformed, "unparsed": 0}
        result |= {"figures": {name: {"value": value, "low": 0, "high": 1} for name, value in figures.items()}}
        result |= {"thought_tokens": tokens, "response_tokens": None}
        path = tmp_path / benchmark / "arm/ours.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(result))

    write("wildbench", 3, True, 1, 8.0, reward=10.0)
    write("popqa", 1, False, 0, 4.0, accuracy=40.0, other=None)
    (row,) = read_rows(tmp_path)
    assert (row["wildbench/reward"], row["popqa/accuracy"], row["average"], row["chat_average"]) == (10, 40, 25, 10)
    assert (row["malformed"], row["unparsed"], row["thought_tokens"]) == (0.25, 0, 7)
    assert math.isnan(row["response_tokens"])  # unknown is not 0
    assert math.isnan(row["popqa/other"]) and math.isnan(row["ifbench/accuracy"])
    assert last_values([row], {"a": "average", "b": "ifbench/accuracy"}, tmp_path)["a"] == 25
    assert Estimate((math.nan, math.nan)).format() == "–"
    with pytest.raises(UserError, match="--metrics.b: mmlu_pro/x was never logged"):
        last_values([row], {"b": "mmlu_pro/x"}, tmp_path)


def test_difference_is_paired_by_prompt_and_seed(tmp_path: Path) -> None:
    """Two seeds: the resamples of A are those of B plus 1 and plus 3, so the difference is 2 in every resample."""
    noise = [float(value) for value in range(1000)]

    def write(name: str, benchmark: str, chat: bool, shift: float) -> Path:
        path = tmp_path / name / benchmark / "arm/ours.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"chat": chat}))
        pq.write_table(pa.table({"reward": [shift + value for value in noise]}), path.with_suffix(".resamples.parquet"))
        return tmp_path / name

    more = [write("a1", "wildbench", True, 1.0), write("a2", "wildbench", True, 3.0)]
    than = [write("b1", "wildbench", True, 0.0), write("b2", "wildbench", True, 0.0)]
    pairs = list(zip(more, than, strict=True))
    for logged in ("wildbench/reward", "chat_average", "average"):
        found = interval_over_prompts(pairs, logged)
        assert found is not None and (found.value, found.low, found.high) == pytest.approx((2, 2, 2))
    write("a1", "popqa", False, 5.0)
    assert read_resamples(more[0], "chat_average") == pytest.approx([1 + value for value in noise])
    assert read_resamples(more[0], "average") == pytest.approx([3 + value for value in noise])
    assert interval_over_prompts(pairs, "popqa/reward") is None
    assert interval_over_prompts([(tmp_path, tmp_path)], "average") is None


def test_missing_metrics_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no version_\*/metrics.csv was found"):
        read_rows(tmp_path)
    with pytest.raises(UserError, match=r"--metrics.rubric: val/b was never logged in"):
        last_values([{"step": 1.0}], {"rubric": "val/b"}, tmp_path)
