"""Part 8 of benchmarks/gpu.py: the update of a LoRA policy with one option changed at a time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_models import Setup, batch_of, gradients, relative
from torch import Tensor

from rlmt.models import LoRA
from rlmt.models.activation_checkpointing import Checkpointing
from rlmt.models.adapters import is_adapter_layer
from rlmt.models.liger import bind_kernels
from rlmt.models.logprobs import token_logprobs
from rlmt.models.micro_batch import micro_batches
from rlmt.models.rows import packs_rows
from rlmt.models.training_mode import set_training_mode
from rlmt.models.varlen import VARLEN, register_varlen
from rlmt.types import RolloutBatch


@dataclass(frozen=True)
class Variant:
    """One way to compute the update."""

    name: str
    checkpointing: Checkpointing = True
    change: Callable[[Any], object] = lambda model: None
    """Changes the model before its first forward; what it returns is not used."""
    needs: str | None = None
    """Package without which it is skipped."""
    on_cpu: bool = True
    """Whether it is measured on a CPU, too."""


def cast_inputs(model: Any) -> None:
    """PEFT's default: adapters cast their inputs to float32, also under autocast."""
    for layer in model.modules():
        if is_adapter_layer(layer):
            layer.cast_input_dtype_enabled = True


def compile_layers(model: Any) -> None:
    """Compiles each decoder layer."""
    for layer in model.get_decoder().layers:
        layer.compile()


def pack_rows(model: Any) -> None:
    """Attends by torch's variable-length kernel."""
    register_varlen()
    model.set_attn_implementation(VARLEN)


VARIANTS = (
    Variant("gradient_checkpointing true"),
    Variant("compiled layers", change=compile_layers, needs="triton", on_cpu=False),
    Variant("gradient_checkpointing selective", "selective"),
    Variant("gradient_checkpointing false", False),
    Variant("adapters cast their inputs", change=cast_inputs),
    Variant(
        "flash_attention_2",
        change=lambda model: model.set_attn_implementation("flash_attention_2"),
        needs="flash_attn",
        on_cpu=False,
    ),
    Variant("Liger's kernels", change=bind_kernels, needs="liger_kernel", on_cpu=False),
    Variant("packed rows", change=pack_rows),
)
"""The first one is what the others are compared with."""


def options(setup: Setup) -> None:
    """Part 8: tokens per second, peak and gradients of each variant."""
    expected: dict[str, Tensor] | None = None
    batch = batch_of(setup, 1, 8, setup.scale(256, 16), setup.scale(768, 16))
    for variant in VARIANTS:
        if variant.needs is not None and importlib.util.find_spec(variant.needs) is None:
            setup.report.skip(f"{variant.name}: {variant.needs} is not installed")
        elif not (setup.on_gpu or variant.on_cpu):
            setup.report.skip(f"{variant.name}: on a GPU only")
        else:
            try:
                found = measure(setup, variant, batch)
            except torch.OutOfMemoryError:
                setup.report.skip(f"{variant.name}: out of memory")
                continue
            expected = expected or found
            limit = 0.2 if setup.on_gpu else 1e-4  # random weights amplify the rounding of bfloat16
            setup.report.equal(
                f"{variant.name}, gradient against the first, relative", relative(found, expected), limit
            )


def measure(setup: Setup, variant: Variant, batch: RolloutBatch) -> dict[str, Tensor]:
    """Reports speed and peak of a variant, and returns its gradients."""
    model = setup.model(setup.scale(8, 2))
    LoRA().add_to(model)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # zero at first, and then the gradient of A is zero
            torch.nn.init.normal_(parameter, std=0.01)
    set_training_mode(model, variant.checkpointing, dropout=False)
    variant.change(model)
    (micro,) = micro_batches(batch, range(8), 10**9, False, setup.device, packed=packs_rows(model))
    tokens = micro.input_ids.numel()

    def update() -> None:
        with torch.autocast(setup.device_type, torch.bfloat16, enabled=setup.on_gpu):
            outputs = token_logprobs(model, micro, 1.0)
            loss = outputs.logprobs.mean() + outputs.entropy.mean()
        loss.backward()  # type: ignore[no-untyped-call]

    setup.speed_and_peak(variant.name, tokens, update)
    model.zero_grad(set_to_none=True)
    update()
    return gradients(model)
