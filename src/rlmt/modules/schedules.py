"""Learning rates over a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from rlmt.errors import UserError
from rlmt.ranges import PositiveInt, UnitIntervalBelowOne, check_ranges

OptimizerCallable = Callable[[Any], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]


class CosineWithWarmup(LambdaLR):
    """Linear warm-up, then half a cosine down to 0.

    Step k of n, counted from 0, is taken at the optimizer's rate times (k + 1) / (w + 1) in the first w = ⌈warmup · n⌉
    steps, and times (1 + cos(π (k - w) / (n - w))) / 2 from then on. transformers' schedule of that shape takes its
    first step at rate 0; on rollouts that would be one drawn in vain.

    Args:
        optimizer: whose learning rates are the peak.
        steps: optimizer steps until the rate is 0; null takes the whole run.
        warmup: share of the steps to warm up in.

    Raises:
        UserError: an argument is out of its range.
    """

    def __init__(
        self, optimizer: Optimizer, steps: PositiveInt | None = None, warmup: UnitIntervalBelowOne = 0.05
    ) -> None:
        check_ranges(CosineWithWarmup, locals())
        self.steps, self.warmup = steps, warmup
        super().__init__(optimizer, lambda step: self._factor(step))

    def over(self, steps: int) -> None:
        """Says how long the run is; to be called before the first step.

        Args:
            steps: optimizer steps of the run, -1 if it has no end.

        Raises:
            UserError: the schedule has no end, or one before the run's.
        """
        if self.steps is not None and steps > self.steps:
            raise UserError(
                f"--model.scheduler.steps is {self.steps}: the run has {steps} steps, and the learning rate would be 0 "
                "in the rest of them; leave steps out, and it is the run's."
            )
        if self.steps is None and steps < 1:
            raise UserError("--model.scheduler.steps is missing: the run has no end; give it, or --trainer.max_steps.")
        self.steps = self.steps or steps
        self._last_lr = [rate * self._factor(self.last_epoch) for rate in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """Where it is. Its shape is the configuration's, so that a run that is resumed to go on for longer does."""
        return {name: value for name, value in super().state_dict().items() if name not in ("steps", "warmup")}

    def _factor(self, step: int) -> float:
        if self.steps is None:
            return 1.0  # until `over` is called
        warm = math.ceil(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        done = min(1.0, (step - warm) / max(1, self.steps - warm))
        return (1 + math.cos(math.pi * done)) / 2


def with_schedule(optimizer: Optimizer, scheduler: LRSchedulerCallable | None, steps: int) -> Any:
    """What Lightning wants of `configure_optimizers`: the optimizer, and the scheduler, if there is one.

    Args:
        optimizer: whose learning rate it is.
        scheduler: waits for the optimizer.
        steps: optimizer steps of the run, -1 if it has no end.

    Raises:
        UserError: the scheduler goes by a metric, or does not fit the run.
    """
    if scheduler is None:
        return optimizer
    schedule = scheduler(optimizer)
    if isinstance(schedule, ReduceLROnPlateau):
        raise UserError("--model.scheduler ReduceLROnPlateau wants a metric at each step: use one of steps.")
    if isinstance(schedule, CosineWithWarmup):
        schedule.over(steps)
    return {"optimizer": optimizer, "lr_scheduler": schedule}
