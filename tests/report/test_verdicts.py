"""Each verdict: a synthetic run that trips it, one that does not, and the thresholds by hand."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlmt.report.series import Series
from rlmt.report.verdicts import CHECKS, State, threshold_table, verdicts, welch_t, worst

AT = np.arange(40)
DOCS = Path(__file__).parents[2] / "docs"


def states(metrics: dict[str, Series], **options: Any) -> dict[str, State]:
    return {verdict.check.key: verdict.state for verdict in verdicts(metrics, **options)}


def test_healthy_run_is_ok_in_every_verdict(synthetic: Any) -> None:
    found = states(synthetic.metrics(), float32=True)
    assert found == dict.fromkeys([c.key for c in CHECKS if c.key != "held_out_loss"], State.OK)
    assert worst(verdicts(synthetic.metrics())) is State.OK


NOISE = np.random.default_rng(1).normal(0, 0.1, 40)
HELD_OUT = np.where(AT % 10 == 9, 1.0, np.nan)

TRIPPED = [
    ("reward_trend", {"reward__mean": NOISE}, State.WATCH),
    ("reward_trend", {"reward__mean": NOISE - AT}, State.PROBLEM),
    ("reward_trend", {"reward__mean": [1.0] * 40}, State.WATCH),  # no noise at all: the change is exactly 0
    ("held_out", {"val__rubric": HELD_OUT * np.array([0, 1, 2, 1.4]).repeat(10)}, State.WATCH),
    ("held_out", {"val__rubric": HELD_OUT * np.array([0, 2, 1, 0.5]).repeat(10)}, State.PROBLEM),
    ("held_out", {"val__rubric": HELD_OUT * np.array([3, 2, 1, 0]).repeat(10)}, State.PROBLEM),
    ("held_out", {"val__rubric": None, "val__reward_mean": HELD_OUT * AT[::-1]}, State.PROBLEM),
    ("kl", {"policy__kl": 0.02 * AT}, State.WATCH),  # the mean of the last eight steps is 0.71
    ("kl", {"policy__kl": 0.1 * AT}, State.PROBLEM),
    ("entropy", {"policy__entropy": 2 - 0.04 * AT}, State.WATCH),  # 2 → 0.58: 71 % lost
    ("entropy", {"policy__entropy": 2 * np.exp(-AT / 10)}, State.PROBLEM),
    ("clip", {"policy__clip_high": [0.25] * 40}, State.WATCH),
    ("clip", {"policy__clip_low": [0.2] * 40, "policy__clip_high": [0.21] * 40}, State.PROBLEM),
    ("malformed", {"reward__malformed": [0.1] * 40}, State.WATCH),
    ("malformed", {"reward__malformed": [0.02] * 32 + [0.3] * 8}, State.PROBLEM),
    ("truncated", {"length__truncated": [0.06] * 40}, State.WATCH),
    ("truncated", {"length__truncated": [0.8] * 40}, State.PROBLEM),
    ("zero_signal", {"reward__zero_std_groups": [0.5] * 40}, State.WATCH),
    ("zero_signal", {"reward__zero_std_groups": [1.0] * 40}, State.PROBLEM),
    ("mismatch", {"engine__mismatch_max": [0.002] * 39 + [0.7]}, State.WATCH),
    ("mismatch", {"engine__mismatch_max": [0.002] * 39 + [3.0]}, State.PROBLEM),
    ("length_drift", {"length__response_mean": [20.0] * 20 + [60.0] * 20}, State.WATCH),
    ("length_drift", {"length__response_mean": [20.0] * 20 + [4.0] * 20}, State.PROBLEM),
    ("length_drift", {"length__thought_mean": [90.0] * 20 + [0.0] * 20}, State.PROBLEM),
]  # fmt: skip


@pytest.mark.parametrize(("key", "changes", "state"), TRIPPED)
def test_sick_run_trips_its_verdict_alone(key: str, changes: dict[str, Any], state: State, synthetic: Any) -> None:
    found = states(synthetic.metrics(**changes))
    assert found.pop(key) is state
    assert set(found.values()) == {State.OK}


def test_every_threshold_has_a_run_that_trips_it() -> None:
    tripped = {(key, state) for key, _, state in TRIPPED}
    supervised = {("held_out_loss", State.WATCH), ("held_out_loss", State.PROBLEM)}  # below
    assert tripped | supervised == {(check.key, state) for check in CHECKS for state in (State.WATCH, State.PROBLEM)}


@pytest.mark.parametrize(
    ("last", "state"), [(1.0, State.OK), (1.019, State.OK), (1.05, State.WATCH), (1.1, State.PROBLEM)]
)
def test_held_out_loss_of_a_supervised_run(last: float, state: State) -> None:
    loss = Series(np.array([9.0, 19, 29]), np.array([2.0, 1.0, last]))
    assert states({"sft/loss": loss, "val/loss": loss}) == {"held_out_loss": state}


def test_float32_engine_must_agree_closely_unless_its_weights_are_rounded(synthetic: Any) -> None:
    off = {"engine__mismatch_max": [0.1] * 40}
    assert states(synthetic.metrics(**off))["mismatch"] is State.OK
    assert states(synthetic.metrics(**off), float32=True)["mismatch"] is State.WATCH
    rounded = synthetic.metrics(**off, engine__importance_mean=[1.0] * 40)
    assert states(rounded, float32=True)["mismatch"] is State.OK


def test_held_out_reward_may_fall_with_the_training_reward(synthetic: Any) -> None:
    falls = HELD_OUT * np.array([3, 2, 1, 0]).repeat(10)
    found = states(synthetic.metrics(val__rubric=falls, reward__mean=5 - AT))
    assert found["held_out"] is State.OK and found["reward_trend"] is State.PROBLEM


def test_part_of_the_trained_reward_is_no_held_out_reward(synthetic: Any) -> None:
    falls = HELD_OUT * np.array([3, 2, 1, 0]).repeat(10)
    assert states(synthetic.metrics(val__length=falls, reward__length=[0.0] * 40))["held_out"] is State.OK


def test_short_run_is_too_early_to_judge(synthetic: Any) -> None:
    short = {name: Series(s.steps[:9], s.values[:9]) for name, s in synthetic.metrics().items() if s.steps[0] == 0}
    found = verdicts(short)
    assert {verdict.state for verdict in found} == {State.UNKNOWN} and worst(found) is State.UNKNOWN
    assert worst([]) is State.UNKNOWN


def test_verdicts_without_their_metrics_are_left_out() -> None:
    assert verdicts({"time/step_s": Series(np.arange(20.0), np.ones(20))}) == []


def test_change_is_welchs_t() -> None:
    from scipy.stats import ttest_ind

    values = np.random.default_rng(2).normal(0, 1, 50) + np.linspace(0, 1, 50)
    expected = ttest_ind(values[-10:], values[:10], equal_var=False).statistic
    assert welch_t(Series(np.arange(50.0), values)) == pytest.approx(expected, rel=1e-12)


def test_every_verdict_has_its_place_in_the_documentation() -> None:
    for check in CHECKS:
        page, _, anchor = check.anchor.partition("#")
        headings = re.findall(r"^#+ (.+)$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs, check.key
        assert f"| {check.title} |" in threshold_table()
        assert check.watch < check.problem
