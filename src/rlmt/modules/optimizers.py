"""Optimizers and learning-rate schedules that torch does not have."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torch.overrides import TorchFunctionMode

from rlmt.errors import UserError
from rlmt.options import NonNegativeFloat, PositiveInt, UnitIntervalBelowOne, check_ranges

OptimizerCallable = Callable[[Any], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]

_IN_LAYER = re.compile(r"\.\d+\.")
"""Matches names of parameters in numbered layers, such as model.layers.0.mlp.up_proj.weight."""


class ProductsInFloat32(TorchFunctionMode):
    """Multiplies bfloat16 matrices on the CPU in float32 and rounds each product to bfloat16.

    That is what a bfloat16 unit computes, up to the order of the sum. torch's own loop for CPUs without such a unit
    (AVX2 only) computes it some fifty times slower, and Muon asks for bfloat16 whatever the CPU.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        slow = func in (torch.addmm, Tensor.matmul, Tensor.__matmul__) and all(
            arg.dtype is torch.bfloat16 and arg.device.type == "cpu" for arg in args
        )
        return func(*(arg.float() for arg in args), **kwargs).bfloat16() if slow else func(*args, **kwargs)


class MuonAdamW(Optimizer):
    """Muon for the matrices of the layers, AdamW for embeddings, norms, biases and heads; for training from scratch.

    One optimizer with two parts, since the modules step one optimizer. A scheduler scales both learning rates.

    Args:
        params: Parameter groups with names, as `rlmt.modules.SFT` and `RewardModeling` pass them; options of a group
            are not read.
        lr: Learning rate of AdamW.
        muon_lr: Learning rate of Muon.
        betas: Betas of AdamW.
        momentum: Momentum of Muon.
        weight_decay: Weight decay of both.

    Raises:
        UserError: The parameters have no names, or no layer has a matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: NonNegativeFloat = 3e-3,
        muon_lr: NonNegativeFloat = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: NonNegativeFloat = 0.95,
        weight_decay: NonNegativeFloat = 0.01,
    ) -> None:
        check_ranges(MuonAdamW, locals())
        super().__init__(params, {"lr": lr})
        if not all("param_names" in group for group in self.param_groups):
            raise UserError("--model.optimizer MuonAdamW requires named parameters: use it with SFT or RewardModeling.")
        named = [
            pair for group in self.param_groups for pair in zip(group["param_names"], group["params"], strict=True)
        ]
        matrices = [(name, p) for name, p in named if p.ndim == 2 and _IN_LAYER.search(name)]
        rest = [(name, p) for name, p in named if not (p.ndim == 2 and _IN_LAYER.search(name))]
        if not matrices or not rest:
            raise UserError("--model.optimizer MuonAdamW finds only matrices in layers, or none: use AdamW.")
        self._parts: tuple[Optimizer, ...] = (
            Muon(matrices, lr=muon_lr, weight_decay=weight_decay, momentum=momentum),
            AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay),
        )
        self._share()

    def _share(self) -> None:
        """Shares the parts' groups and state: the same objects, so that schedulers act on the parts."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self.state.clear()
        for part in self._parts:
            self.state.update(part.state)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps both parts."""
        loss: Tensor | None = None if closure is None else closure()
        has_unit = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # what torch itself asks before each product
        with nullcontext() if has_unit else ProductsInFloat32():
            for part in self._parts:
                part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State of one optimizer with the groups of both parts, which FSDP2 can unshard."""
        self._share()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of both parts."""
        groups = iter(state_dict["param_groups"])
        for part in self._parts:
            own = [next(groups) for _ in part.param_groups]
            numbers = {number for group in own for number in group["params"]}
            state = {number: values for number, values in state_dict["state"].items() if number in numbers}
            part.load_state_dict({"state": state, "param_groups": own})
        self._share()


class CosineWithWarmup(LambdaLR):
    """Linear warm-up, then half a cosine down to 0.

    Step k of n, counted from 0, is taken at the optimizer's rate times (k + 1) / (w + 1) in the first w = ⌈warmup · n⌉
    steps, and times (1 + cos(π (k - w) / (n - w))) / 2 from then on. The schedule of that shape in transformers takes
    its first step at rate 0, which would waste a rollout batch.

    Args:
        optimizer: Optimizer whose learning rates are the peak.
        steps: Optimizer steps until the rate is 0; null is the whole run.
        warmup: Fraction of the steps to warm up in.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(
        self, optimizer: Optimizer, steps: PositiveInt | None = None, warmup: UnitIntervalBelowOne = 0.05
    ) -> None:
        check_ranges(CosineWithWarmup, locals())
        self.steps, self.warmup = steps, warmup
        super().__init__(optimizer, lambda step: self._factor(step))

    def set_run_length(self, steps: int) -> None:
        """Sets the number of steps of the run; to be called before the first step.

        Args:
            steps: Optimizer steps of the run, -1 if it has no end.

        Raises:
            UserError: The schedule has no end, or ends before the run.
        """
        if self.steps is not None and steps > self.steps:
            raise UserError(
                f"--model.scheduler.steps is {self.steps}: the run has {steps} steps, and the learning rate would be 0 "
                "in the rest of them. Leave steps out to use the run's."
            )
        if self.steps is None and steps < 1:
            raise UserError(
                "--model.scheduler.steps is missing, and the run has no end: set it, or --trainer.max_steps."
            )
        self.steps = self.steps or steps
        self._last_lr = [rate * self._factor(self.last_epoch) for rate in self.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """Position of the schedule. Its shape comes from the configuration, so that a resumed run can be longer."""
        return {name: value for name, value in super().state_dict().items() if name not in ("steps", "warmup")}

    def _factor(self, step: int) -> float:
        if self.steps is None:
            return 1.0  # until `set_run_length` is called
        warm = math.ceil(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        done = min(1.0, (step - warm) / max(1, self.steps - warm))
        return (1 + math.cos(math.pi * done)) / 2


def with_schedule(optimizer: Optimizer, scheduler: LRSchedulerCallable | None, steps: int) -> Any:
    """Returns what `configure_optimizers` returns to Lightning: the optimizer, and the scheduler if there is one.

    Args:
        optimizer: The optimizer.
        scheduler: Called with the optimizer.
        steps: Optimizer steps of the run, -1 if it has no end.

    Raises:
        UserError: The scheduler requires a metric, or does not fit the run.
    """
    if scheduler is None:
        return optimizer
    schedule = scheduler(optimizer)
    if isinstance(schedule, ReduceLROnPlateau):
        raise UserError(
            "--model.scheduler ReduceLROnPlateau requires a metric at each step: use a scheduler that does not."
        )
    if isinstance(schedule, CosineWithWarmup):
        schedule.set_run_length(steps)
    return {"optimizer": optimizer, "lr_scheduler": schedule}
