"""Step timing, and averages over optimizer steps, against numbers derived by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from rlmt.modules import metrics as module
from rlmt.modules.base import TrainingModule
from rlmt.modules.metrics import StepTimer, UpdateMetrics


def test_step_time_includes_loading_and_leaves_validation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # start, end of step 0, begin and end of a validation, end of step 1
    clock = iter([100.0, 110.0, 1000.0, 1500.0, 1511.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    rollouts = SimpleNamespace(seconds={"rollout": 2.0, "sync": 1.0})
    generated: Any = SimpleNamespace(rollouts=rollouts, lengths=torch.tensor([210, 15]))
    timer = StepTimer()
    timer.start()
    first = timer.step(began=101.0, scored=105.0, generated=generated)
    phases = {"time/rollout_s": 2.0, "time/sync_s": 1.0, "time/reward_s": 1.0, "time/update_s": 5.0}
    gib = first.pop("perf/memory_gib")
    assert first == phases | {"time/step_s": 10.0, "perf/tokens_per_s": 22.5}
    resident = int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
    assert resident * 0.9 < gib < 64  # the peak is at least what the process has now
    timer.pause()
    timer.resume()
    second = timer.step(began=1501.0, scored=1505.0, generated=generated)
    assert second["time/step_s"] == 901.0  # 890 s to the validation and 11 s after it
    assert second["perf/tokens_per_s"] == 225 / 901


def test_averages_weigh_every_token_and_maxima_are_maximized() -> None:
    metrics = UpdateMetrics()
    metrics.update({"policy/kl": torch.tensor([1.0, 2.0, 6.0]), "policy/ratio_max": torch.tensor([1.0, 3.0])})
    metrics.update({"policy/kl": torch.tensor([7.0]), "policy/ratio_max": torch.tensor([2.0])})
    metrics.update_step({"policy/loss": 0.25})
    metrics.update_step({"policy/loss": 1.0})
    assert metrics.compute() == {"policy/kl": 4.0, "policy/ratio_max": 3.0, "policy/loss": 0.625}


def test_nan_of_a_token_is_seen_in_the_average() -> None:
    metrics = UpdateMetrics()
    metrics.update({"policy/kl": torch.tensor([1.0, float("nan")]), "policy/ratio_max": torch.tensor([float("nan")])})
    assert all(value != value for value in metrics.compute().values())


def test_averages_over_ranks_weigh_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    other = UpdateMetrics()
    other.update({"policy/kl": torch.tensor([1.0, 1.0, 1.0]), "policy/ratio_max": torch.tensor([9.0])})
    other.update({"dpo/margin": torch.tensor([5.0])})  # a name that this rank does not have
    monkeypatch.setattr(module, "all_gather_object", lambda own: [own, other._metrics])
    metrics = UpdateMetrics()
    metrics.update({"policy/kl": torch.tensor([5.0]), "policy/ratio_max": torch.tensor([2.0])})
    assert metrics.compute() == {"policy/kl": 2.0, "policy/ratio_max": 9.0, "dpo/margin": 5.0}


@pytest.mark.parametrize(
    ("value", "shown"), [(1234.4, 1234.0), (0.5, 0.5), (math.inf, math.inf), (-math.inf, -math.inf)]
)
def test_progress_bar_shows_large_numbers_without_decimals(value: float, shown: float) -> None:
    training = MagicMock()
    TrainingModule.log_step(training, {"policy/kl": value}, 1, {"policy/kl": "kl"})
    assert [call.args for call in training.log.call_args_list] == [("policy/kl", value), ("kl", shown)]
