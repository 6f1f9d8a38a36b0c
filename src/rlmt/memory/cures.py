"""Settings that make a run fit which does not, with the peaks that they lead to; and the cards that a run fits on."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from rlmt.data import RolloutDataModule
from rlmt.engines import VLLMEngine
from rlmt.memory.budget import make_budget
from rlmt.memory.bytes import Parallelism
from rlmt.memory.engine_options import choose_engine_options
from rlmt.memory.records import GIB, Budget
from rlmt.models import NF4, LoRA
from rlmt.modules import RLMTModule
from rlmt.rewards import ClassifierReward

CARDS = {
    "T4": 14.5,
    "L4": 22.0,
    "A10G": 22.0,
    "RTX 4090": 23.5,
    "A100-40GB": 39.3,
    "L40S": 44.3,
    "A100-80GB": 79.1,
    "H100": 79.1,
    "H200": 139.7,
}
"""Card → memory in GiB that CUDA reports on it, rounded down; less than the GB that the card is sold with."""

_LORA = LoRA(rank=16, alpha=32)
"""As in configs/lora.yaml and configs/qlora.yaml."""

Change = tuple[Any, str, Any]
"""Object, name of its attribute, and the attribute's value under a cure."""


@dataclass(frozen=True)
class Cure:
    """Options that make a run fit, and the peak that they lead to."""

    options: str
    peak: int
    """Bytes."""


def find_cures(
    module: RLMTModule,
    data: RolloutDataModule,
    compute: torch.dtype,
    memory: int,
    devices: Parallelism,
    budget: Budget,
) -> list[Cure]:
    """Tries the settings that save memory, and returns those with which the run fits.

    Args:
        module: RL module of the run that does not fit.
        data: Its data module.
        compute: dtype of the forward.
        memory: Memory of the device in bytes.
        devices: Number of devices and sharding.
        budget: Budget of the run.

    Returns:
        The cures that fit, from the one that changes the run least to the one that changes it most.
    """
    cures = []
    for options, changes, parallel in _candidates(module, data, compute, devices):
        precision = torch.bfloat16 if options.startswith("--config qlora") else compute
        with _changed([*_chosen(data), *changes]):
            if not make_budget(module, data, precision, memory, parallel, activations=False).fits_on(memory):
                continue
            if options:
                choose_engine_options(module, data, precision, memory, parallel)
            tried = make_budget(module, data, precision, memory, parallel) if options else budget
        if not tried.fits_on(memory):
            continue
        peak = tried.total(tried.peak)
        if tried.vllm is not None and not tried.fits:
            least, most = tried.vllm_limits()
            share = max(least, round(most - 0.01, 2))  # up to a hundredth of the memory stays free
            options = f"{options} --data.engine.gpu_memory_utilization {share}".strip()
            peak = tried.peak_with(share)
        cures.append(Cure(options, peak))
    return cures


def fitting_cards(budget: Budget) -> dict[str, bool]:
    """Card → whether the run fits on it, with the `gpu_memory_utilization` that suits the card."""
    return {card: budget.fits_on(int(size * GIB)) for card, size in CARDS.items()}


def _candidates(
    module: RLMTModule, data: RolloutDataModule, compute: torch.dtype, devices: Parallelism
) -> Iterator[tuple[str, list[Change], Parallelism]]:
    """Options of each cure, what they change, and the devices; "" is a smaller cache alone."""
    yield "", [], devices
    smaller: list[Change] = [(module, "tokens_per_micro_batch", min(4096, module.tokens_per_micro_batch))]
    smaller.append((module, "gradient_checkpointing", True))
    small = "--model.tokens_per_micro_batch 4096 --model.gradient_checkpointing true"
    yield small, smaller, devices
    if devices.sharded and not devices.bf16_residual and module.lora is None and compute is torch.bfloat16:
        yield "--trainer.strategy.bf16_residual true", [], replace(devices, bf16_residual=True)
    lora: list[Change] = [(module, "lora", _LORA)]
    rewards = [reward for reward in module.reward.modules() if isinstance(reward, ClassifierReward)]
    reward_4_bit: list[Change] = [(reward, "quantization", NF4()) for reward in rewards]
    if module.lora is None:
        yield "--config lora", lora, devices
    own_reward = isinstance(module.reward, ClassifierReward) and module.reward.quantization is None
    if own_reward:
        yield "--config lora --model.reward.quantization rlmt.models.NF4", lora + reward_4_bit, devices
    if devices.sharded and not devices.offload:
        yield "--trainer.strategy.offload true", [], replace(devices, offload=True)
    if module.quantization is None and isinstance(data.engine, VLLMEngine) and own_reward and not devices.sharded:
        qlora = [*lora, *reward_4_bit, (module, "quantization", NF4()), (module, "gradient_checkpointing", True)]
        qlora += [(module, "tokens_per_micro_batch", 8192), (module.reward, "tokens_per_batch", 8192)]
        qlora += [(data.engine, "quantization", "fp8_per_channel"), (data.engine, "max_num_batched_tokens", 2048)]
        qlora.append((data.engine, "left_to_plan", data.engine.left_to_plan | {"quantization"}))
        if find_spec("bitsandbytes") is not None:
            optim: Any = importlib.import_module("bitsandbytes.optim")
            qlora.append((module, "optimizer_factory", optim.PagedAdamW8bit))
        yield "--config qlora", qlora, devices
    if devices.ranks == 1 and module.quantization is None:
        yield "--config fsdp --trainer.devices 8", [], Parallelism(8, True)
        yield "--config fsdp --trainer.devices 8 --trainer.strategy.offload true", [], Parallelism(8, True, True)


def _chosen(data: RolloutDataModule) -> list[Change]:
    """The engine's options that the plan may have set: changes that change nothing, to restore them."""
    names = ("gpu_memory_utilization", "max_num_seqs", "quantization", "rounds_weights")
    engine = data.engine
    return [(engine, name, getattr(engine, name)) for name in names] if isinstance(engine, VLLMEngine) else []


@contextmanager
def _changed(changes: list[Change]) -> Iterator[None]:
    """Sets attributes inside."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
