"""Base of SFT and reward-model training: one optimizer step per batch, its loss summed over micro-batches."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlmt.distributed.collectives import all_gather_object, user_error_on_all_ranks
from rlmt.distributed.gradients import clip_gradients, sum_gradients
from rlmt.errors import UserError
from rlmt.modules.base import TrainingModule


class SupervisedModule(TrainingModule):
    """Trains a model on rows, with one optimizer step per batch.

    Args:
        from_scratch: Start from random weights, initialized with the run's seed: the model's folder then needs
            config.json and a tokenizer only, and weights in it are not read.
        **options: Those of `TrainingModule`.

    Raises:
        UserError: An option is out of range.
    """

    data_module: ClassVar[str]
    """Class name of the data module that it trains on."""

    def __init__(self, from_scratch: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.from_scratch = from_scratch
        if from_scratch and self.lora is not None:
            raise UserError(
                "--model.from_scratch trains random weights, and --model.lora freezes them: leave one of both out."
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All parameters to train, with their names, so that an optimizer can treat some of them differently."""
        return [{"params": [(name, p) for name, p in self.named_parameters() if p.requires_grad]}]

    @property
    def optimizer_steps(self) -> int:
        """The batches of the run: one step each."""
        steps = self.trainer.estimated_stepping_batches
        return -1 if math.isinf(steps) else int(steps)

    def take_step(self, losses: Iterable[Tensor]) -> tuple[float, float]:
        """Takes one optimizer step on a loss that is summed over micro-batches and ranks.

        Args:
            losses: The micro-batches of this rank: their shares in the loss of the whole step, computed one by one.

        Returns:
            The loss, and the norm of the gradient before clipping.

        Raises:
            UserError: One of both is not finite; no step is taken.
        """
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        own_loss = torch.zeros((), device=self.device)
        for loss in losses:
            self.accumulate_gradient(loss)
            own_loss += loss.detach()
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        sum_gradients(trained)
        norm = clip_gradients(trained, self.max_grad_norm)
        total = sum(all_gather_object(float(own_loss)))
        if not (math.isfinite(norm) and math.isfinite(total)):
            raise user_error_on_all_ranks(
                f"Stopped before optimizer step {self.global_step + 1}: the loss is {total}, the norm of its gradient "
                f"{norm}. Lower the learning rate, and resume from the last checkpoint."
            )
        self.optimizer_step_and_schedule()
        optimizer.zero_grad()
        return total, norm

    @property
    @abstractmethod
    def mismatch(self) -> str:
        """What the weights of a checkpoint do not fit, and the fix, for an error message."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads the weights of a checkpoint.

        Raises:
            UserError: They are not those of this model.
        """
        error = UserError(f"The checkpoint's weights do not fit {self.mismatch}.")
        if state_dict.keys() != self.state_dict().keys():
            raise error
        try:
            return super().load_state_dict(state_dict, strict=False, assign=assign)
        except RuntimeError as cause:
            raise error from cause
