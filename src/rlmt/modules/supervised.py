"""What SFT and reward-model training share: one optimizer step a batch, its loss cut into micro-batches that add up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from rlmt.checkpointing.config_changes import apply_optimizer_options, optimizer_options
from rlmt.checkpointing.random_states import random_states, restore_random_states
from rlmt.distributed.collectives import all_gather_object, clip_gradients, sum_gradients, user_error_on_all_ranks
from rlmt.errors import UserError
from rlmt.models.adapters import LoRA
from rlmt.models.quantization import NF4
from rlmt.modules.checkpoints import rlmt_state
from rlmt.modules.checks import (
    adapter_state,
    check_adapter_options,
    check_adapter_state,
    trainable_names,
)
from rlmt.modules.schedules import LRSchedulerCallable, OptimizerCallable, with_schedule
from rlmt.ranges import PositiveFloat, PositiveInt, check_ranges


class SupervisedModule(LightningModule):
    """Trains a model on rows, all of a batch in one optimizer step.

    Args:
        from_scratch: start from random weights instead, drawn by the run's seed: the model's folder then needs
            config.json and a tokenizer alone, and weights in it are not read.
        optimizer: made from the trainable parameters, which it is given with their names.
        scheduler: made from the optimizer and stepped after each of its steps; null keeps the learning rate constant.
        tokens_per_micro_batch: tokens, padding included, that one forward and backward holds; the sequences of a
            comparison stay together.
        max_grad_norm: the gradient is clipped to this norm.
        gradient_checkpointing: trade time for memory in the backward.
        attn_implementation: transformers' name of an attention, such as flash_attention_2; null lets it choose.
        lora: trains an adapter on the frozen model; null trains all parameters. The frozen weights are held in the
            number format that the forward computes in.
        quantization: holds the frozen model in 4 bits (QLoRA); wants `lora`.

    Raises:
        UserError: an option is out of range.
    """

    data_module: ClassVar[str]
    """What it is trained on."""
    kind: ClassVar[str]
    """What its checkpoints say that they are of."""

    def __init__(
        self,
        from_scratch: bool = False,
        optimizer: OptimizerCallable = AdamW,
        scheduler: LRSchedulerCallable | None = None,
        tokens_per_micro_batch: PositiveInt = 16384,
        max_grad_norm: PositiveFloat = 1.0,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        lora: LoRA | None = None,
        quantization: NF4 | None = None,
    ) -> None:
        check_ranges(SupervisedModule, locals())
        super().__init__()
        self.automatic_optimization = False
        check_adapter_options(lora, quantization, from_scratch)
        self.from_scratch = from_scratch
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.max_grad_norm = max_grad_norm
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.lora, self.quantization = lora, quantization
        self._optimizer, self._scheduler = optimizer, scheduler

    @property
    def _fitting(self) -> bool:
        return self.trainer.state.fn == "fit"

    def _check_adapter(self) -> None:
        """Raises UserError where the model has no layers for the adapter, or 4 bits cannot be had."""
        if self.lora is not None:
            self._planned_adapter()
        if self.quantization is not None:
            self.quantization.check()

    def _ready(self, model: PreTrainedModel) -> PreTrainedModel:
        """A model just loaded, its adapter added, set for the stage."""
        if self.lora is not None:
            self.lora.add_to(model)
        model.train(self._fitting)
        if self._fitting and self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def configure_optimizers(self) -> Any:
        """The optimizer over what can be trained, and the scheduler if there is one."""
        made = make_optimizer(self.trainer, self, self._optimizer, self._scheduler)
        parts = made if isinstance(made, dict) else {"optimizer": made, "lr_scheduler": None}
        self._configured = optimizer_options(parts["optimizer"], parts["lr_scheduler"])
        return made

    def on_train_start(self) -> None:
        """Options of the optimizer and the scheduler are those of this start, whatever a checkpoint had."""
        apply_optimizer_options(self, self._configured)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """All weights; with LoRA those that are trained, the adapter and new heads."""
        state = super().state_dict(*args, **kwargs)
        trained = state.keys() if self.lora is None else trainable_names(self)
        return {name: tensor for name, tensor in state.items() if name in trained}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads a checkpoint's weights.

        Raises:
            UserError: they are not those of this model.
        """
        misfit = UserError(f"The checkpoint's weights do not fit {self._misfit}.")
        if state_dict.keys() != self.state_dict().keys():
            raise misfit
        try:
            return super().load_state_dict(state_dict, strict=False, assign=assign)
        except RuntimeError as error:
            raise misfit from error

    @property
    def _trained(self) -> PreTrainedModel:
        """The model, once it is there."""
        raise NotImplementedError

    @property
    def _misfit(self) -> str:
        """What a checkpoint's weights do not fit, and the cure, for the message."""
        raise NotImplementedError

    def _record(self) -> dict[str, Any]:
        """What all checkpoints say beside their weights."""
        return {"module": self.kind, **adapter_state(self._trained, self.quantization), **self.resume_state()}

    def resume_state(self) -> dict[str, Any]:
        """What changes while training beside weights, optimizer and scheduler, as plain data; of this rank."""
        return {"random": [random_states()]}

    def _planned_adapter(self) -> Any:
        """The configuration that the adapter will have; None without."""
        raise NotImplementedError

    def check_checkpoint(self, checkpoint: Mapping[str, Any], fitting: bool) -> None:
        """Refuses a checkpoint of something else or of another adapter; reads no weights.

        Args:
            checkpoint: as loaded.
            fitting: whether training is to go on from it.

        Raises:
            UserError: it is one.
        """
        saved = rlmt_state(checkpoint, self.kind)
        check_adapter_state(saved, None if self.lora is None else self._planned_adapter(), self.quantization)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on from a checkpoint.

        Raises:
            UserError: as `check_checkpoint`.
        """
        self.check_checkpoint(checkpoint, self._fitting)
        if self._fitting:
            restore_random_states(checkpoint["rlmt"]["random"])


def make_optimizer(
    trainer: Trainer, model: nn.Module, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None
) -> Any:
    """The optimizer over what is trained, and the scheduler, stretched over the run, if there is one.

    The optimizer is given parameters with their names, so that it can treat some unlike others.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    steps = trainer.estimated_stepping_batches  # a batch is a step
    return with_schedule(optimizer([{"params": named}]), scheduler, -1 if math.isinf(steps) else int(steps))


def take_step(module: LightningModule, losses: Iterable[Tensor], max_grad_norm: float) -> tuple[float, float]:
    """One optimizer step on a loss that comes in parts, over all ranks.

    Args:
        module: with manual optimisation.
        losses: this rank's micro-batches' shares of the loss of the whole step; each is made when it is asked for.
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
        with _block_parallel_sync_behavior(module.trainer.strategy):  # gradients are summed once, below
            module.manual_backward(loss)
        total += loss.detach()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    sum_gradients(trained)
    norm = clip_gradients(trained, max_grad_norm)
    whole = sum(all_gather_object(float(total)))
    if not (math.isfinite(norm) and math.isfinite(whole)):
        raise user_error_on_all_ranks(
            f"Stopped before optimizer step {module.global_step + 1}: the loss is {whole}, the norm of its "
            f"gradient {norm}; lower the learning rate, and continue from the last checkpoint."
        )
    optimizer.step()
    if isinstance(scheduler, LRScheduler):
        scheduler.step()
    optimizer.zero_grad()
    return whole, norm
