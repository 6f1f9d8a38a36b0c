"""Bins, error and picture of a reward model's calibration."""

from pathlib import Path

import numpy as np
import pytest

from rlmt.report.calibration import calibration_bins, calibration_error, draw_calibration


def test_bins_by_hand() -> None:
    """log 3 is a probability of 3/4, log 9 of 9/10."""
    differences = np.log([3.0, 3.0, 3.0, 1 / 3, 9.0, 1 / 9, 9.0, 9.0])
    unsure, sure = calibration_bins(differences, bins=2)
    assert (unsure.predicted, unsure.observed, unsure.count) == (pytest.approx(0.75), 0.75, 4)
    assert (sure.predicted, sure.observed, sure.count) == (pytest.approx(0.9), 0.75, 4)
    assert calibration_error([unsure, sure]) == pytest.approx(0.15 / 2)
    (tie,) = calibration_bins(np.zeros(1), bins=10)
    assert (tie.predicted, tie.observed) == (0.5, 0.5)


def test_a_model_that_is_right_as_often_as_it_says_has_no_error() -> None:
    draw = np.random.default_rng(0)
    size = draw.exponential(1.5, 40_000)
    right = draw.random(size.shape) < 1 / (1 + np.exp(-size))
    bins = calibration_bins(np.where(right, size, -size))
    assert len(bins) == 10 and sum(b.count for b in bins) == 40_000
    assert calibration_error(bins) < 0.01
    assert calibration_error(calibration_bins(np.where(right, 4 * size, -4 * size))) > 0.1


def test_the_picture(tmp_path: Path) -> None:
    bins = calibration_bins(np.random.default_rng(0).normal(1, 2, 200))
    assert draw_calibration(tmp_path / "run" / "calibration.png", bins).read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["calibration.png"]
