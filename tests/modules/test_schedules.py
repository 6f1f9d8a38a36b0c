"""The learning rate of every step against the formula and against transformers' schedule."""

import math

import pytest
import torch
from torch.optim import AdamW
from transformers import get_cosine_schedule_with_warmup

from rlmt.errors import UserError
from rlmt.modules.optimizers import CosineWithWarmup


def optimizer(*rates: float) -> AdamW:
    return AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def rates(made: AdamW, scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(made.param_groups[0]["lr"])
        made.step()
        scheduler.step()
    return seen


def test_by_hand() -> None:
    made = optimizer(4.0, 8.0)
    scheduler = CosineWithWarmup(made, steps=7, warmup=0.4)  # 2.8 steps of warm-up are 3
    scheduler.set_run_length(7)
    middle = [2 * (1 + math.cos(math.pi * part / 4)) for part in range(4)]
    assert rates(made, scheduler, 9) == pytest.approx([1.0, 2.0, 3.0, *middle, 0.0, 0.0], abs=1e-12)
    assert made.param_groups[1]["lr"] == 2 * made.param_groups[0]["lr"]


def test_without_warm_up_it_is_the_one_of_transformers() -> None:
    ours, theirs = optimizer(1.0), optimizer(1.0)
    scheduler = CosineWithWarmup(ours, warmup=0.0)
    scheduler.set_run_length(20)
    assert rates(ours, scheduler, 21) == pytest.approx(
        rates(theirs, get_cosine_schedule_with_warmup(theirs, 0, 20), 21)
    )


def test_after_the_warm_up_it_is_the_one_of_transformers() -> None:
    ours, theirs = optimizer(1.0), optimizer(1.0)
    scheduler = CosineWithWarmup(ours, steps=20, warmup=0.25)
    got, expected = (
        rates(o, s, 20) for o, s in ((ours, scheduler), (theirs, get_cosine_schedule_with_warmup(theirs, 5, 20)))
    )
    assert got[5:] == pytest.approx(expected[5:])
    assert 0 == expected[0] < got[0] < got[1] < 1  # no step is taken at rate 0


def test_one_that_is_resumed_goes_on_and_over_a_longer_run() -> None:
    whole, first, second, longer = (optimizer(1.0) for _ in range(4))
    schedulers = [CosineWithWarmup(made) for made in (whole, first, second, longer)]
    for scheduler, steps in zip(schedulers, (10, 10, 10, 40), strict=True):
        scheduler.set_run_length(steps)
    expected = rates(whole, schedulers[0], 10)
    begun = rates(first, schedulers[1], 4)
    for made, scheduler in ((second, schedulers[2]), (longer, schedulers[3])):
        made.load_state_dict(first.state_dict())
        scheduler.load_state_dict(schedulers[1].state_dict())
    assert begun + rates(second, schedulers[2], 6) == expected
    assert min(rates(longer, schedulers[3], 36)[1:]) > 0


@pytest.mark.parametrize(("options", "named"), [({"steps": 0}, "steps"), ({"warmup": 1.0}, "warmup")])
def test_options_out_of_range_are_named(options: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=f"CosineWithWarmup.{named} is"):
        CosineWithWarmup(optimizer(1.0), **options)  # type: ignore[arg-type]


def test_a_run_that_outlives_its_schedule_is_refused() -> None:
    with pytest.raises(UserError, match="steps is 5: the run has 6"):
        CosineWithWarmup(optimizer(1.0), steps=5).set_run_length(6)
    with pytest.raises(UserError, match="steps is missing"):
        CosineWithWarmup(optimizer(1.0)).set_run_length(-1)
    CosineWithWarmup(optimizer(1.0), steps=5).set_run_length(-1)
