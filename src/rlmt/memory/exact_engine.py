"""Whether vLLM has room for the policy's weights as they are, or takes them in 8 bits (`quantization: auto`)."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer

from rlmt.data import RolloutDataModule
from rlmt.distributed.fsdp2 import FSDP2
from rlmt.engines import VLLMEngine
from rlmt.memory.budget import make_budget
from rlmt.memory.bytes import Parallelism
from rlmt.modules import RLMTModule

_SAMPLES = 8
"""Samples of the maximum length for which vLLM's cache has room beside exact weights; with fewer at a time, generation
would be slow."""


def choose_for_trainer(module: RLMTModule, data: RolloutDataModule, trainer: Trainer) -> None:
    """Decides for the devices of a Trainer, before its processes have started.

    Args:
        module: As in `choose_quantization`.
        data: As in `choose_quantization`.
        trainer: The Trainer of the run.

    Raises:
        UserError: As in `choose_quantization`.
    """
    compute = torch.bfloat16 if trainer.precision == "bf16-mixed" else torch.float32
    devices = Parallelism(trainer.world_size, isinstance(trainer.strategy, FSDP2))
    device = trainer.strategy.root_device
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    choose_quantization(module, data, compute, memory, devices)


def choose_quantization(
    module: RLMTModule, data: RolloutDataModule, compute: torch.dtype, memory: int | None, devices: Parallelism
) -> None:
    """Decides for the engines whose quantization is `auto`; a later call with another memory decides again.

    Args:
        module: RL module with its options; no weights are loaded into it.
        data: Data module with its engines.
        compute: dtype of the forward.
        memory: Memory of the device in bytes; None is a CPU, where weights are not rounded.
        devices: Number of devices and sharding.

    Raises:
        UserError: The plan of the run cannot be made.
    """
    engines = [engine for engine in (data.engine, data.val_engine) if isinstance(engine, VLLMEngine)]
    automatic = [engine for engine in engines if engine.auto_quantization]
    for engine in automatic:
        engine.quantize(None)
    if memory is None or not automatic:
        return
    share = make_budget(module, data, compute, memory, devices, activations=False).vllm
    if share is None or share.cache < _SAMPLES * share.sample:
        for engine in automatic:
            engine.quantize("fp8_per_channel")
