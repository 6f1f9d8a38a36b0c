"""Adapters on frozen weights, as options of a module: what fits together, and what its checkpoints say of it."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Trainer
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rlmt.errors import UserError
from rlmt.models import loading
from rlmt.models.adapters import LoRA, adapter_config, check_same_adapter
from rlmt.models.quantization import NF4


def check_adapter_options(lora: LoRA | None, quantization: NF4 | None, from_scratch: bool = False) -> None:
    """Raises UserError where an adapter and what it is put on do not go together."""
    if quantization is not None and lora is None:
        raise UserError("--model.quantization: weights in 4 bits cannot be trained; add --model.lora LoRA.")
    if from_scratch and lora is not None:
        raise UserError(
            "--model.from_scratch draws weights to be trained, and --model.lora keeps them as they are: leave one out."
        )


def planned_adapter(config: PretrainedConfig, lora: LoRA | None, auto: Any = AutoModelForCausalLM) -> Any:
    """The configuration that a model's adapter will have, as plain data; None without. No weights are read.

    Args:
        config: of the model.
        lora: the adapter's options.
        auto: transformers' class that loads the model.

    Raises:
        UserError: the model has no layers for it.
    """
    return None if lora is None else lora.config(loading.skeleton(config, auto))


def held_dtype(trainer: Trainer, lora: LoRA | None) -> Literal["float32", "bfloat16"]:
    """What a model's weights are held in: float32 if they are trained, else what they are multiplied in."""
    return "bfloat16" if lora is not None and trainer.precision == "bf16-mixed" else "float32"


def trained_names(module: nn.Module) -> set[str]:
    """Names of the weights that are trained."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def adapter_record(model: PreTrainedModel, quantization: NF4 | None) -> dict[str, Any]:
    """For a checkpoint, what makes the model of the base's weights: its adapter, and how the base is quantised."""
    return {"adapter": adapter_config(model), "quantization": _plain(quantization)}


def check_record(saved: dict[str, Any], adapter: dict[str, Any] | None, quantization: NF4 | None) -> None:
    """Refuses a checkpoint of another adapter or another base than the run's.

    Args:
        saved: what `adapter_record` gave.
        adapter: the run's, as `planned_adapter` gives it.
        quantization: how the run holds the base.

    Raises:
        UserError: it is one.
    """
    check_same_adapter(saved, {"adapter": adapter, "quantization": _plain(quantization)})


def _plain(quantization: NF4 | None) -> dict[str, Any] | None:
    return None if quantization is None else quantization.to_dict()
