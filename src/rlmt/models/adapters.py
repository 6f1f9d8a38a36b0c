"""LoRA adapters on a frozen base: PEFT layers injected into the model, without PEFT's wrapper class.

The base is never written to: no merge, no unmerge. Engines without LoRA and the export get merged weights from
`merge_adapter`, one tensor at a time and on a copy.

Functions import PEFT when they use it: it imports bitsandbytes and torch's compiler, which would take seconds at the
start of every command, and most runs have no adapter.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rlmt.annotations import LoraConfig, PreTrainedModel
from rlmt.errors import UserError
from rlmt.options import FinitePositiveFloat, PositiveInt, UnitIntervalBelowOne, check_ranges
from rlmt.types import AdapterWeights

POLICY = "default"
"""Name of the policy's adapter."""
CRITIC = "critic"
"""Name of the critic's adapter if policy and critic share a base."""

_FUNCTION_OPTIONS = ("r", "lora_alpha", "target_modules", "use_dora", "use_rslora")
"""PEFT options that change the function of the adapter's weights; dropout does not."""
PEFT_PREFIX = "base_model.model."
"""Prefix of names in PEFT's file format."""


class LoRA:
    """Low-rank adapters (arXiv 2106.09685): a linear layer W becomes W + scale · B A, and only A and B are trained.

    A is random and B is zero at first, so training starts from the base. The scale is alpha / rank. The adapter is
    float32 whatever dtype the base has.

    Args:
        rank: Number of rows of A and columns of B.
        alpha: Scale of the update, before it is divided by the rank.
        dropout: Dropout probability of the adapter's inputs in training; with 0 the engine and the trainer compute the
            same function.
        target_modules: Last parts of the names of linear layers, such as q_proj, or `all-linear` for all below the
            head. The output projection cannot have an adapter: log-probs are computed from its weight.
        dora: Whether the norm of each row of W is trained beside its direction (DoRA, arXiv 2402.09353).
        rslora: Whether the scale is alpha / sqrt(rank), for high ranks (rsLoRA, arXiv 2312.03732).

    Raises:
        UserError: An option is out of range, or later: the model has no such layers.
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
        """Lists the last parts of the names of the layers that get an adapter, sorted; no weights are read.

        Args:
            model: The model, possibly on the meta device.

        Raises:
            UserError: The model has no such linear layer below its head.
        """
        modules = [(name.rpartition(".")[2], layer) for name, layer in model.base_model.named_modules()]
        below = {name for name, layer in modules if isinstance(layer, nn.Linear) or is_adapter_layer(layer)}
        below -= {"base_layer", POLICY, CRITIC}  # inside a layer that already has an adapter
        below -= {name for name, layer in modules if _selects_experts(layer)}
        below = {name for name in below if _peft_supports(model, name)}
        selected = below if self.target_modules == "all-linear" else set(self.target_modules)
        if unknown := sorted(selected - below):
            raise UserError(
                f"lora.target_modules names {unknown[0]}, but {type(model).__name__} has no such linear layer below "
                f"its head; choose from {', '.join(sorted(below))}."
            )
        if not selected:
            raise UserError(f"{type(model).__name__} has no linear layers that LoRA could adapt: use another model.")
        return sorted(selected)

    def _peft_config(self, model: PreTrainedModel) -> LoraConfig:
        from peft import LoraConfig

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
        """Computes the configuration that the adapter will have on this model; equals `adapter_config` after `add_to`.

        Raises:
            UserError: The model has no such linear layers.
        """
        return _plain(self._peft_config(model))

    def add_to(self, model: PreTrainedModel, adapter_name: str = POLICY) -> None:
        """Adds an adapter to a model in place, and freezes everything except the adapters.

        If the model already has an adapter, both are trained, and the first stays active.

        Args:
            model: A causal language model or a classifier; its head gets no adapter.
            adapter_name: Name of the new adapter.

        Raises:
            UserError: The model has no such linear layers.
        """
        from peft import inject_adapter_in_model

        first = next(iter(adapter_names(model)), adapter_name)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter, on purpose
            inject_adapter_in_model(self._peft_config(model), model, adapter_name)
        model.requires_grad_(False)
        layers: Iterator[Any] = model.modules()
        for layer in layers:
            if is_adapter_layer(layer):
                layer._active_adapter = [first]
                # Inputs have the adapter's dtype, or autocast casts both: PEFT's cast to float32 would be undone at
                # once, and backward would save a copy for every adapter. DoRA computes norms in the dtype of the input.
                layer.cast_input_dtype_enabled = self.dora
                for module in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                    module.float().requires_grad_(True)
                if self.dora and adapter_name in layer.lora_magnitude_vector:
                    _reset_magnitude(layer, adapter_name)


def _selects_experts(layer: nn.Module) -> bool:
    """True for a router that is a linear layer with a forward of its own, which an adapter would replace."""
    router = isinstance(layer, nn.Linear) and type(layer).forward is not nn.Linear.forward
    return router and type(layer).__module__.startswith("transformers.")


def _peft_supports(model: PreTrainedModel, name: str) -> bool:
    """False for layers of state-space models whose weight a fused kernel reads past the adapter."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name)
    except ValueError:
        return False
    return True


def _reset_magnitude(layer: Any, adapter: str) -> None:
    """Recomputes DoRA's row norms of the base in float32: PEFT rounds them to the base's dtype."""
    layer.lora_magnitude_vector[adapter].update_layer(
        base_layer=layer.get_base_layer(),
        lora_A=layer.lora_A[adapter].weight,
        lora_B=layer.lora_B[adapter].weight,
        scaling=layer.scaling[adapter],
    )


@contextmanager
def use_adapter(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Activates another adapter, or with None only the frozen base; `requires_grad` does not change.

    A no-op on a model without adapters.
    """
    layers: list[Any] = [module for module in model.modules() if is_adapter_layer(module)]
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    # PEFT's own methods also change requires_grad, and the graph of the other adapter would lose its leaves.
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
    """The trainable parameters of a policy or a critic; on a shared base each has its own."""
    own = getattr(model, "own_parameters", None)
    if own is not None:
        return list(own())
    return [p for name, p in model.named_parameters() if p.requires_grad and f".{CRITIC}." not in name]


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters on a model, oldest first."""
    return list(getattr(model, "peft_config", {}))


def adapter_config(model: nn.Module, adapter: str = POLICY) -> dict[str, Any] | None:
    """An adapter's configuration as PEFT writes it to adapter_config.json, as plain data; None without the adapter."""
    if adapter not in adapter_names(model):
        return None
    configs: Any = model.peft_config
    return _plain(configs[adapter])


def _plain(config: LoraConfig) -> dict[str, Any]:
    """PEFT's configuration as plain JSON data: sets become sorted lists, enumerations strings."""
    plain: Any = config.to_dict()  # type: ignore[no-untyped-call]
    return cast(dict[str, Any], json.loads(json.dumps(plain, default=sorted)))


def adapter_weights(model: PreTrainedModel, adapter: str = POLICY) -> AdapterWeights | None:
    """An adapter as PEFT writes it to a folder, with the tensors themselves, not copies; None without the adapter."""
    config = adapter_config(model, adapter)
    if config is None:
        return None
    own = {name: p.detach() for name, p in model.named_parameters() if f".{adapter}." in name and is_adapter(name)}
    from peft import get_peft_model_state_dict

    named = get_peft_model_state_dict(model, own, adapter, save_embedding_layers=False)
    return AdapterWeights(config, {PEFT_PREFIX + name: tensor for name, tensor in named.items()})


def is_adapter_layer(module: nn.Module) -> bool:
    """True for a layer of PEFT, which computes a linear layer and its adapters; does not import PEFT."""
    return hasattr(type(module), "_active_adapter")


def is_adapter(name: str) -> bool:
    """True if the name of a model's parameter belongs to an adapter."""
    return ".lora_" in name


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights without its adapters under their Hugging Face names; tied weights under each name.

    Weights in 4 bits stay packed: see `rlmt.models.quantization.dequantize`.
    """
    # state_dict, because named_parameters names tied weights only once, and an engine's head would become stale.
    state = model.state_dict(keep_vars=True)
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if not (is_adapter(name) or ".weight." in name)  # bitsandbytes stores a weight's statistics under its name
    }


def check_same_adapter(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Checks that a checkpoint has the adapter options and the base of this run.

    Args:
        saved: The checkpoint's `adapter` (from `adapter_config`) and `quantization`; each can be None.
        current: Those of this run.

    Raises:
        UserError: They differ in an option that changes the policy's function.
    """
    fix = "give the --model.lora and --model.quantization of the run that wrote it."
    theirs, ours = saved.get("adapter"), current["adapter"]
    if theirs is None or ours is None:
        if theirs is not ours:
            contents = ["all weights" if adapter is None else "a LoRA adapter" for adapter in (theirs, ours)]
            raise UserError(
                f"--ckpt_path: the checkpoint holds {contents[0]}, and this run trains {contents[1]}; {fix}"
            )
        return
    pairs = {f"lora {key}": (theirs[key], ours[key]) for key in _FUNCTION_OPTIONS}
    pairs["quantization"] = (saved.get("quantization"), current["quantization"])
    for option, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise UserError(f"--ckpt_path: the checkpoint has {option} {theirs}, this run {ours}; {fix}")


@torch.no_grad()
def merge_adapter(name: str, weight: Tensor, adapter: AdapterWeights) -> Tensor:
    """Merges the adapter into a copy of one weight of the base; a weight without adapter is returned as it is.

    W + s B A with s = alpha / rank (rsLoRA: alpha / sqrt(rank)); with DoRA each row is scaled to its trained norm.

    Args:
        name: Hugging Face name of the weight.
        weight: [out, in] frozen weight, in any floating-point dtype.
        adapter: The adapter, from `adapter_weights`.

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
