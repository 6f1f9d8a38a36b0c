"""Monitored metrics are checked against the names that a run logs."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from rlmt.algorithms import DPO, GRPO, PPO
from rlmt.errors import UserError
from rlmt.modules.monitors import METRICS, check_monitors, logged_names
from rlmt.rewards import FormatReward, WeightedSum
from rlmt.rewards.held_out import HeldOutRewards
from rlmt.rewards.rules import RegexReward

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")


class Module(SimpleNamespace):
    """The attributes of an RLMTModule that its metrics depend on."""


Module.__module__ = "rlmt.modules"


def module(algorithm: Any = None, **options: Any) -> Module:
    parts = WeightedSum([FormatReward(), RegexReward("a", name="brief")], [1.0, 1.0])
    held_out = HeldOutRewards([FormatReward("judge")])
    values = {"kind": "RLMTModule", "algorithm": algorithm or GRPO(), "reward": parts, "held_out": held_out}
    return Module(**{**values, **options})


def check(model: Module, *callbacks: Callback) -> None:
    check_monitors(SimpleNamespace(lightning_module=model, callbacks=list(callbacks)))  # type: ignore[arg-type]


def documented(section: str) -> set[str]:
    names = re.findall(r"`([a-z]+/[\w/<>]+)`", "".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)))
    return {name for name in names if "<" not in name}


def test_names_are_those_of_the_documentation() -> None:
    rl, supervised = PAGE.split("## SFT and reward models")
    assert set(METRICS["RLMTModule"].split()) == documented(rl)
    assert set(METRICS["SFT"].split()) | set(METRICS["RewardModeling"].split()) == documented(supervised)


def test_names_depend_on_objective_and_rewards() -> None:
    names = logged_names(module())
    assert {"val/judge", "val/brief", "reward/format", "policy/kl"} <= set(names)
    assert not [name for name in names if name.startswith(("critic/", "dpo/"))]
    assert "critic/loss" in logged_names(module(PPO()))
    assert "dpo/accuracy" in logged_names(module(DPO()))
    assert "val/format" not in logged_names(module(reward=FormatReward()))
    assert "val/loss" in logged_names(Module(kind="SFT"))


@pytest.mark.parametrize("name", ["val/jugde", "val/judge_mean", "judge"])
def test_unknown_monitor_lists_the_nearest_names(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"^EarlyStopping.monitor: the run logs no metric '{name}'; use .*val/judge.*\.$"
    ):
        check(module(), EarlyStopping(name))
    with pytest.raises(UserError, match="ModelCheckpoint.monitor: .*'zzz'; use a column of metrics.csv"):
        check(module(), ModelCheckpoint(monitor="zzz"))


def test_known_monitors_are_accepted() -> None:
    for name in ("val/judge", "reward/mean", "reward"):  # the last one is on the progress bar
        check(module(), EarlyStopping(name), ModelCheckpoint(monitor=name))
    check(module(), ModelCheckpoint(), ModelCheckpoint(monitor="step"), EarlyStopping("later", strict=False))
    check(Module(kind="RewardModeling"), ModelCheckpoint(monitor="val/accuracy/chat"))


def test_own_classes_may_log_other_metrics() -> None:
    class OwnCallback(Callback):
        pass

    class OwnObjective(GRPO):
        pass

    check(module(), EarlyStopping("mine"), OwnCallback())
    check(module(OwnObjective()), EarlyStopping("mine"))
