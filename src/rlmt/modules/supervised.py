"""What SFT and reward-model training share: one optimizer step a batch, its loss cut into micro-batches that add up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from rlmt.errors import UserError
from rlmt.modules.rlmt import PRECISIONS, LRSchedulerCallable, OptimizerCallable
from rlmt.modules.schedules import CosineWithWarmup


def check_options(positive: dict[str, float], not_negative: dict[str, float]) -> None:
    """Raises UserError for an option of the module that is out of its range."""
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise UserError(f"--model.{name} is {value}: it must be positive.")
    for name, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise UserError(f"--model.{name} is {value}: it must be 0 or positive.")


def check_trainer(trainer: Trainer) -> None:
    """Raises UserError where the trainer cannot do what these modules need."""
    if trainer.precision not in PRECISIONS:
        raise UserError(
            f"--trainer.precision is {trainer.precision}: use {' or '.join(PRECISIONS)}, since small updates are lost "
            "in weights of 16 bits."
        )
    if trainer.world_size > 1:
        raise UserError(f"--trainer.devices gives {trainer.world_size} processes: it is trained on one; set 1.")


def make_optimizer(
    trainer: Trainer, model: nn.Module, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None
) -> Any:
    """The optimizer over what is trained, and the scheduler, stretched over the run, if there is one.

    The optimizer is given parameters with their names, so that it can treat some unlike others.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    made = optimizer([{"params": named}])
    if scheduler is None:
        return made
    schedule = scheduler(made)
    if isinstance(schedule, ReduceLROnPlateau):
        raise UserError("--model.scheduler ReduceLROnPlateau wants a metric at each step: use one of steps.")
    if isinstance(schedule, CosineWithWarmup):
        steps = trainer.estimated_stepping_batches  # a batch is a step
        schedule.over(-1 if math.isinf(steps) else int(steps))
    return {"optimizer": made, "lr_scheduler": schedule}


def take_step(module: LightningModule, losses: Iterable[Tensor], max_grad_norm: float) -> tuple[float, float]:
    """One optimizer step on a loss that comes in parts.

    Args:
        module: with manual optimisation.
        losses: each micro-batch's share of the step's loss; each is made when it is asked for.
        max_grad_norm: the gradient is clipped to this norm.

    Returns:
        The loss, and the gradient's norm before clipping.

    Raises:
        UserError: one of the two is not finite; no step is taken.
    """
    optimizer, scheduler = module.optimizers(), module.lr_schedulers()
    assert not isinstance(optimizer, list)
    optimizer.zero_grad()
    total = torch.zeros((), device=module.device)
    for loss in losses:
        module.manual_backward(loss)
        total += loss.detach()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(trained, max_grad_norm))
    if not (math.isfinite(norm) and math.isfinite(total)):
        raise UserError(
            f"Stopped before optimizer step {module.global_step + 1}: the loss is {float(total)}, the norm of its "
            f"gradient {norm}; lower the learning rate, and continue from the last checkpoint."
        )
    optimizer.step()
    if isinstance(scheduler, LRScheduler):
        scheduler.step()
    optimizer.zero_grad()
    return float(total), norm
