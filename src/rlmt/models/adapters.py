"""Adapters on a frozen base: LoRA by PEFT, inside the model's own class, so that the rest of rlmt sees no wrapper.

The base is never written to: no merge, no unmerge. What needs merged weights (an engine without LoRA, an export) gets
them from `merged`, one tensor at a time and on a copy.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlmt.errors import UserError
from rlmt.options import FinitePositiveFloat, PositiveInt, UnitIntervalBelowOne, check_ranges
from rlmt.types import AdapterWeights

POLICY = "default"
"""Name of the adapter that makes the policy."""
CRITIC = "critic"
"""Name of the adapter that makes the critic, where both share a base."""

_DECISIVE = ("r", "lora_alpha", "target_modules", "use_dora", "use_rslora")
"""Of PEFT's options those that make the adapter's weights mean what they mean; dropout is none."""
PEFT_PREFIX = "base_model.model."
"""What PEFT's file format puts before each name."""


class LoRA:
    """Low-rank adapters (arXiv 2106.09685): a linear layer W becomes W + scale · B A, and only A and B are trained.

    A starts random and B at zero, so training starts from the base. Their scale is alpha / rank. The adapter is held in
    float32 whatever the base is held in.

    Args:
        rank: rows of A and columns of B.
        alpha: the update's weight, before it is divided by the rank.
        dropout: share of the adapter's inputs that training drops; 0 keeps the engine's function and the trainer's the
            same.
        target_modules: last parts of the names of the linear layers to adapt, such as q_proj, or `all-linear` for all
            below the head. The output projection cannot be one: log-probs are taken from its weight.
        dora: learn the size of each row of W beside its direction (DoRA, arXiv 2402.09353).
        rslora: scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732), for high ranks.

    Raises:
        UserError: an option is out of range, or later, the model has no such layers.
    """

    def __init__(
        self,
        rank: PositiveInt = 16,
        alpha: FinitePositiveFloat = 32,
        dropout: UnitIntervalBelowOne = 0.0,
        target_modules: Literal["all-linear"] | list[str] = "all-linear",
        dora: bool = False,
        rslora: bool = False,
    ) -> None:
        check_ranges(LoRA, locals())
        if not target_modules or (isinstance(target_modules, str) and target_modules != "all-linear"):
            raise UserError(f"lora.target_modules is {target_modules!r}: give all-linear or a list of layers.")
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.target_modules = target_modules
        self.dora, self.rslora = dora, rslora

    def targets(self, model: PreTrainedModel) -> list[str]:
        """Last parts of the names of the layers that get an adapter, in order; the weights are not read.

        Raises:
            UserError: the model has no such linear layer below its head.
        """
        modules = model.base_model.named_modules()
        below = {name.rpartition(".")[2] for name, layer in modules if isinstance(layer, nn.Linear | BaseTunerLayer)}
        below -= {"base_layer", POLICY, CRITIC}  # inside of a layer that has an adapter already
        wanted = below if self.target_modules == "all-linear" else set(self.target_modules)
        if unknown := sorted(wanted - below):
            raise UserError(
                f"lora.target_modules names {unknown[0]}, and {type(model).__name__} has no such linear layer below "
                f"its head; choose from {', '.join(sorted(below))}."
            )
        if not wanted:
            raise UserError(f"{type(model).__name__} has no linear layers that LoRA could adapt: use another model.")
        return sorted(wanted)

    def _peft(self, model: PreTrainedModel) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=cast(int, int(self.alpha) if float(self.alpha).is_integer() else self.alpha),
            lora_dropout=self.dropout,
            target_modules=self.targets(model),
            use_dora=self.dora,
            use_rslora=self.rslora,
            base_model_name_or_path=model.name_or_path,
        )

    def config(self, model: PreTrainedModel) -> dict[str, Any]:
        """The adapter's configuration for this model, as `adapter_config` gives it once the adapter is there.

        Raises:
            UserError: the model has no such linear layers.
        """
        return _plain(self._peft(model))

    def add_to(self, model: PreTrainedModel, adapter_name: str = POLICY) -> None:
        """Puts a new adapter on a model, in place, and freezes all of the model but its adapters.

        Where there is one already, both are trained, and the first stays the one that the model runs with.

        Args:
            model: a causal language model or a classifier; its head gets no adapter.
            adapter_name: what to call it.

        Raises:
            UserError: the model has no such linear layers.
        """
        first = next(iter(adapter_names(model)), adapter_name)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter, on purpose
            inject_adapter_in_model(self._peft(model), model, adapter_name)
        model.requires_grad_(False)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer._active_adapter = [first]
                for module in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                    module.float().requires_grad_(True)
                if self.dora and adapter_name in layer.lora_magnitude_vector:
                    _reset_magnitude(layer, adapter_name)


def _reset_magnitude(layer: Any, adapter: str) -> None:
    """Makes DoRA's row sizes those of the base in float32: PEFT rounds them to the base's number format."""
    layer.lora_magnitude_vector[adapter].update_layer(
        base_layer=layer.get_base_layer(),
        lora_A=layer.lora_A[adapter].weight,
        lora_B=layer.lora_B[adapter].weight,
        scaling=layer.scaling[adapter],
    )


@contextmanager
def use_adapter(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Runs the model with another adapter, or None for its frozen base alone; which are trained stays as it is.

    Harmless on a model without adapters.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    # PEFT's own switches also change requires_grad, and a graph of one adapter would lose its leaves to the other.
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]
    try:
        yield
    finally:
        for layer, name, disabled in before:
            layer._active_adapter, layer._disable_adapters = name, disabled


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is trained of a policy or of a critic: on a shared base each has its own."""
    own = getattr(model, "own_parameters", None)
    if own is not None:
        return list(own())
    return [p for name, p in model.named_parameters() if p.requires_grad and f".{CRITIC}." not in name]


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters on a model, oldest first; none on a model without."""
    return list(getattr(model, "peft_config", {}))


def adapter_config(model: nn.Module, adapter: str = POLICY) -> dict[str, Any] | None:
    """An adapter's configuration as PEFT writes it to adapter_config.json, as plain data; None if there is none."""
    if adapter not in adapter_names(model):
        return None
    configs: Any = model.peft_config
    return _plain(configs[adapter])


def _plain(config: LoraConfig) -> dict[str, Any]:
    """PEFT's configuration as JSON would give it back: sets as sorted lists, enumerations as their words."""
    plain: Any = config.to_dict()  # type: ignore[no-untyped-call]
    return cast(dict[str, Any], json.loads(json.dumps(plain, default=sorted)))


def adapter_weights(model: PreTrainedModel, adapter: str = POLICY) -> AdapterWeights | None:
    """An adapter as PEFT writes it to a folder: configuration, and the tensors themselves; None if there is none."""
    config = adapter_config(model, adapter)
    if config is None:
        return None
    own = {name: p.detach() for name, p in model.named_parameters() if f".{adapter}." in name and is_adapter(name)}
    named = get_peft_model_state_dict(model, own, adapter, save_embedding_layers=False)
    return AdapterWeights(config, {PEFT_PREFIX + name: tensor for name, tensor in named.items()})


def is_adapter(name: str) -> bool:
    """Whether a parameter of a model is part of an adapter."""
    return ".lora_" in name


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights without its adapters, under their plain Hugging Face names; tied ones under each.

    Weights in 4 bits are as they are held: see `rlmt.models.quantization.dequantized`.
    """
    # state_dict and not named_parameters: the latter names tied weights once, and an engine's head would go stale.
    state = model.state_dict(keep_vars=True)
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if not (is_adapter(name) or ".weight." in name)  # bitsandbytes puts a weight's statistics below its name
    }


def check_same_adapter(saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses to go on from a checkpoint of another adapter or another base: its weights would mean something else.

    Args:
        saved: the checkpoint's `adapter` (as `adapter_config` gives it) and `quantization`; None where there is none.
        wanted: this run's.

    Raises:
        UserError: they differ in something that makes the policy another function.
    """
    cure = "give the --model.lora and --model.quantization of the run that wrote it."
    theirs, ours = saved.get("adapter"), wanted["adapter"]
    if theirs is None or ours is None:
        if theirs is not ours:
            words = ["all weights" if adapter is None else "a LoRA adapter" for adapter in (theirs, ours)]
            raise UserError(f"--ckpt_path: the checkpoint holds {words[0]}, and this run trains {words[1]}; {cure}")
        return
    pairs = {f"lora {key}": (theirs[key], ours[key]) for key in _DECISIVE}
    pairs["quantization"] = (saved.get("quantization"), wanted["quantization"])
    for option, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise UserError(f"--ckpt_path: the checkpoint has {option} {theirs}, this run {ours}; {cure}")


@torch.no_grad()
def merge_adapter(name: str, weight: Tensor, adapter: AdapterWeights) -> Tensor:
    """One of the base's weights with the adapter in it, on a copy; a weight without adapter is returned as it is.

    W + s B A with s = alpha / rank (rsLoRA: alpha / sqrt(rank)), and with DoRA each row scaled to its learned size.

    Args:
        name: plain Hugging Face name of the weight.
        weight: [out, in] the frozen weight, in any floating-point format.
        adapter: as `adapter_weights` gives it.

    Returns:
        [out, in] float32.
    """
    layer, config, tensors = PEFT_PREFIX + name.removesuffix(".weight"), adapter.config, adapter.tensors
    if f"{layer}.lora_A.weight" not in tensors:
        return weight
    down, up = (tensors[f"{layer}.lora_{part}.weight"].to(weight.device).float() for part in "AB")
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
    full: Tensor = weight.float() + scale * (up @ down)
    if config["use_dora"]:
        size = tensors[f"{layer}.lora_magnitude_vector"].to(weight.device).float()
        full *= (size / torch.linalg.norm(full, dim=1))[:, None]
    return full
