"""Options of vLLM that are left to the plan: its share of the memory, samples decoded at once, and quantization."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from lightning.pytorch import Trainer

from rlmt.data import RolloutDataModule
from rlmt.engines import VLLMEngine
from rlmt.engines.vllm.engine import DEFAULT_SEQUENCES, DEFAULT_SHARE
from rlmt.memory.budget import make_budget
from rlmt.memory.bytes import Parallelism
from rlmt.memory.records import Budget, VLLMShare
from rlmt.modules import RLMTModule
from rlmt.rewards import CallableReward

_SAMPLES = 8
"""Samples of the maximum length for which vLLM's cache has room beside exact weights; with fewer at a time, generation
would be slow."""
_SPARE = 0.05
"""Part of the device's memory that stays free: torch's allocator fragments, and two lines of the plan are assumed."""
_MOST_SEQUENCES = 1024
"""More samples at once make a step of decoding hardly more efficient."""


def choose_for_trainer(module: RLMTModule, data: RolloutDataModule, trainer: Trainer) -> None:
    """Decides for the devices of a Trainer, before its processes have started.

    Args:
        module: As in `choose_engine_options`.
        data: As in `choose_engine_options`.
        trainer: The Trainer of the run.

    Raises:
        UserError: As in `choose_engine_options`.
    """
    compute = torch.bfloat16 if trainer.precision == "bf16-mixed" else torch.float32
    devices = Parallelism.of(trainer.world_size, trainer.strategy)
    device = trainer.strategy.root_device
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    choose_engine_options(module, data, compute, memory, devices)


def choose_engine_options(
    module: RLMTModule, data: RolloutDataModule, compute: torch.dtype, memory: int | None, devices: Parallelism
) -> None:
    """Sets the options that vLLM engines leave to the plan; a later call with another memory decides again.

    Without own rewards, which can take any memory, vLLM gets what the trainer leaves, and no more than all samples of
    a rank need at their maximum length.

    Args:
        module: RL module with its options; no weights are loaded into it.
        data: Data module with its engines.
        compute: dtype of the forward.
        memory: Memory of the device in bytes; None is a CPU, where weights are not rounded.
        devices: Number of devices and sharding.

    Raises:
        UserError: The plan of the run cannot be made.
    """
    engines = [each for each in (data.engine, data.val_engine) if isinstance(each, VLLMEngine)]
    for each in engines:
        if "gpu_memory_utilization" in each.left_to_plan:
            each.gpu_memory_utilization = DEFAULT_SHARE
        if "max_num_seqs" in each.left_to_plan:
            each.max_num_seqs = DEFAULT_SEQUENCES
        if "quantization" in each.left_to_plan:
            each.quantize(None)
    if memory is None or not any(each.left_to_plan for each in engines):
        return
    engine, own_rewards = data.engine, _has_own_rewards(module)
    samples = max(1, data.batch_size * data.group_size // devices.ranks)

    def plan() -> VLLMShare | None:
        """The share of vLLM under the present quantization; sets it if it is left to the plan."""
        awake = isinstance(engine, VLLMEngine) and not engine.sleep  # then its memory is beside the update's
        budget = make_budget(module, data, compute, memory, devices, activations=awake)
        if not isinstance(engine, VLLMEngine) or "gpu_memory_utilization" not in engine.left_to_plan or own_rewards:
            return budget.vllm
        return _grant(engine, budget, samples * engine.tensor_parallel_size)

    share = plan()
    automatic = [each for each in engines if "quantization" in each.left_to_plan]
    if automatic and (share is None or share.cache < _SAMPLES * share.sample):
        for each in automatic:
            each.quantize("fp8_per_channel")
        share = plan()
    if isinstance(engine, VLLMEngine) and share is not None and "max_num_seqs" in engine.left_to_plan:
        held = min(share.cache // share.sample, samples * engine.tensor_parallel_size, _MOST_SEQUENCES)
        engine.max_num_seqs = max(engine.max_num_seqs, held)


def _has_own_rewards(module: RLMTModule) -> bool:
    """Whether rewards run code of the user, whose memory the plan does not know."""
    rewards = [*module.reward.modules(), *module.held_out.modules()]
    return any(
        isinstance(each, CallableReward) or not type(each).__module__.startswith(("rlmt.", "torch.", "transformers."))
        for each in rewards
    )


def _grant(engine: VLLMEngine, budget: Budget, samples: int) -> VLLMShare:
    """Sets vLLM's share, if any fits: from one sample's cache up to that of all samples, and what the trainer leaves.

    Args:
        engine: The engine.
        budget: Plan with any share.
        samples: Samples that the engine generates in a step.

    Returns:
        The share.
    """
    share = budget.vllm
    assert share is not None
    least, most = budget.vllm_limits()
    if least > most:  # the run does not fit
        return share
    useful = math.ceil(100 * (share.fixed + samples * share.sample) / budget.memory) / 100
    engine.gpu_memory_utilization = max(least, min(round(most - _SPARE, 2), useful))
    cache = round(engine.gpu_memory_utilization * budget.memory) - share.fixed
    return replace(share, granted=engine.gpu_memory_utilization, cache=cache)
