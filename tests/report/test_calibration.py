"""Bins, error and figure of a reward model's calibration."""

from pathlib import Path

import numpy as np
import pytest

from rlmt.report.calibration import draw_calibration
from rlmt.rewards.calibration import calibration_bins, calibration_error


def test_bins_equal_manual_calculation() -> None:
    """A score difference of log 3 is a probability of 3/4, one of log 9 is 9/10."""
    differences = np.log([3.0, 3.0, 3.0, 1 / 3, 9.0, 1 / 9, 9.0, 9.0])
    low, high = calibration_bins(differences, bins=2)
    assert (low.predicted, low.observed, low.count) == (pytest.approx(0.75), 0.75, 4)
    assert (high.predicted, high.observed, high.count) == (pytest.approx(0.9), 0.75, 4)
    assert calibration_error([low, high]) == pytest.approx(0.15 / 2)
    (tie,) = calibration_bins(np.zeros(1), bins=10)
    assert (tie.predicted, tie.observed) == (0.5, 0.5)


def test_calibrated_model_has_no_error() -> None:
    rng = np.random.default_rng(0)
    size = rng.exponential(1.5, 40_000)
    correct = rng.random(size.shape) < 1 / (1 + np.exp(-size))
    bins = calibration_bins(np.where(correct, size, -size))
    assert len(bins) == 10 and sum(b.count for b in bins) == 40_000
    assert calibration_error(bins) < 0.01
    assert calibration_error(calibration_bins(np.where(correct, 4 * size, -4 * size))) > 0.1


def test_figure_is_the_only_file_written(tmp_path: Path) -> None:
    bins = calibration_bins(np.random.default_rng(0).normal(1, 2, 200))
    assert draw_calibration(tmp_path / "run" / "calibration.png", bins).read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["calibration.png"]
