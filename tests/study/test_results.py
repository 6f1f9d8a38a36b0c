"""Means and intervals computed by hand, and metrics of resumed runs."""

from pathlib import Path

import pytest

from rlmt.errors import UserError
from rlmt.report.estimates import Estimate
from rlmt.study.results import last_values, read_rows


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


def test_missing_metrics_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no version_\*/metrics.csv was found"):
        read_rows(tmp_path)
    with pytest.raises(UserError, match=r"--metrics.rubric: val/b was never logged in"):
        last_values([{"step": 1.0}], {"rubric": "val/b"}, tmp_path)
