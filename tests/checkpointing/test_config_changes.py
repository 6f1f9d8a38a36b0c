"""Options that differ from a checkpoint's: which are reported, with which message, and that they take effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR, LinearLR

from rlmt.checkpointing.config_changes import config_changes
from rlmt.checkpointing.optimizer_options import apply_options, optimizer_options
from rlmt.modules.optimizers import CosineWithWarmup

BEFORE: dict[str, Any] = {
    "seed_everything": 0,
    "model": {
        "class_path": "rlmt.modules.RLMTModule",
        "init_args": {
            "algorithm": {"class_path": "rlmt.algorithms.GRPO", "init_args": {"kl_coef": 0.001}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6, "betas": [0.9, 0.999]}},
            "scheduler": None,
        },
    },
    "data": {"class_path": "D", "init_args": {"engine": {"class_path": "E", "init_args": {"urls": ["a"]}}}},
    "trainer": {"max_steps": 10, "default_root_dir": "a", "callbacks": [{"class_path": "x"}], "precision": "32-true"},
    "ckpt_path": None,
}


def changed(**places: Any) -> dict[str, Any]:
    """BEFORE with values at places like `trainer__max_steps`."""
    import copy

    after = copy.deepcopy(BEFORE)
    for place, value in places.items():
        *way, last = place.split("__")
        here = after
        for key in way:
            here = here[key]
        here[last] = value
    return after


OPTIMIZER = "model__init_args__optimizer"
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({}, []),
    "options without effect on results": (
        {"trainer__max_steps": 20, "trainer__default_root_dir": "b", "trainer__callbacks": [], "ckpt_path": "last"},
        [],
    ),
    "other servers": ({"data__init_args__engine__init_args__urls": ["b", "c"]}, []),
    "a number": ({"seed_everything": 1}, ["--seed_everything was 0 and is 1 from here on"]),
    "a list": (
        {f"{OPTIMIZER}__init_args__betas": [0.9, 0.95]},
        ["--model.optimizer.betas was [0.9, 0.999] and is [0.9, 0.95] from here on"],
    ),
    "another class": (
        {"model__init_args__algorithm": {"class_path": "rlmt.algorithms.RLOO", "init_args": {"entropy_coef": 0.1}}},
        [
            "--model.algorithm was 'rlmt.algorithms.GRPO' and is 'rlmt.algorithms.RLOO' from here on",
            "--model.algorithm.entropy_coef was not given and is 0.1 from here on",
            "--model.algorithm.kl_coef was 0.001 and is not given from here on",
        ],
    ),
    "a schedule over the run": (
        {"model__init_args__scheduler": {"class_path": "S", "init_args": {}}, "trainer__max_steps": 20},
        ["--model.scheduler was None and is 'S' from here on", "--trainer.max_steps was 10 and is 20 from here on"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_config_changes_lists_options_that_change_results(case: str) -> None:
    places, lines = CASES[case]
    assert config_changes(BEFORE, changed(**places)) == lines


def trained(optimizer: Any, scheduler: Any, steps: int, state: Any = None) -> tuple[Any, Any]:
    """A new optimizer and scheduler with a checkpoint's state, as in a resumed run."""
    weight = torch.nn.Parameter(torch.ones(2))
    made = optimizer([weight])
    schedule = scheduler(made) if scheduler else None
    if isinstance(schedule, CosineWithWarmup):
        schedule.set_run_length(100)
    options = optimizer_options(made, schedule)
    if state is not None:
        made.load_state_dict(state[0])
        if schedule is not None:
            schedule.load_state_dict(state[1])
        apply_options(options, made, schedule)
    for _ in range(steps):
        weight.grad = torch.ones(2)
        made.step()
        if schedule is not None:
            schedule.step()
    return made, schedule


def states(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    return pair[0].state_dict(), None if pair[1] is None else pair[1].state_dict()


SCHEDULERS: dict[str, Any] = {
    "constant": None,
    "linear": lambda o: LinearLR(o, 0.1, total_iters=10),
    "exponential": lambda o: ExponentialLR(o, 0.9),
    "cosine": lambda o: CosineWithWarmup(o, warmup=0.1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_unchanged_options_keep_the_checkpoints_state(name: str) -> None:
    half = states(trained(lambda p: AdamW(p, lr=0.1), SCHEDULERS[name], 4))
    again = trained(lambda p: AdamW(p, lr=0.1), SCHEDULERS[name], 0, half)
    assert states(again)[0]["param_groups"] == half[0]["param_groups"] and states(again)[1] == half[1]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_new_learning_rate_scales_the_schedule(name: str) -> None:
    """After four steps, and along the rest of the schedule."""
    half = states(trained(lambda p: AdamW(p, lr=0.1), SCHEDULERS[name], 4))
    for steps in (0, 3):
        old, _ = trained(lambda p: AdamW(p, lr=0.1), SCHEDULERS[name], steps, half)
        new, _ = trained(lambda p: AdamW(p, lr=0.3, betas=(0.5, 0.6)), SCHEDULERS[name], steps, half)
        assert new.param_groups[0]["lr"] == pytest.approx(3 * old.param_groups[0]["lr"])
        assert new.param_groups[0]["betas"] == (0.5, 0.6)


def test_scheduler_uses_its_new_options() -> None:
    half = states(trained(lambda p: SGD(p, lr=1.0), lambda o: ExponentialLR(o, 0.9), 2))
    optimizer, _ = trained(lambda p: SGD(p, lr=1.0), lambda o: ExponentialLR(o, 0.5), 1, half)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.81 * 0.5)
