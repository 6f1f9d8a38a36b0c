"""The memory budget of a run per device and phase: weights, optimizer states, activations and caches.

Weights, adapters, gradients and optimizer states are computed from the models' configs. Activations are measured by
running the trainer's code on fake tensors (`rlmt.memory.activations`). vLLM's share is the one that its options grant.
Two figures are assumed, and their names say so.

Left out: fragmentation of torch's allocator, and host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from rlmt.data import RolloutDataModule
from rlmt.distributed.fsdp2 import round_residual_stream
from rlmt.engines import TransformersEngine, VLLMEngine
from rlmt.engines.vllm.tensor_parallel import check_ranks
from rlmt.errors import UserError
from rlmt.memory.activations import BatchShape, Footprint, forward_footprint, update_footprint
from rlmt.memory.bytes import (
    Parallelism,
    all_gather_bytes,
    kv_bytes,
    largest_micro_batch,
    logits_bytes,
    optimizer_bytes,
    optimizer_step_bytes,
    tensor_bytes,
    weight_bytes,
)
from rlmt.memory.known_models import model_config
from rlmt.memory.meta_models import (
    adapter_options,
    meta_critic,
    meta_from_config,
    meta_policy,
    vllm_activation_bytes,
)
from rlmt.memory.records import GIB, PHASES, Budget, BudgetLine, Phase, VLLMShare
from rlmt.models import loading
from rlmt.models.cache import shares_cache
from rlmt.models.loading import cast_linear_weights
from rlmt.models.output_head import output_head
from rlmt.models.quantization import quantized_weights
from rlmt.models.varlen import VARLEN
from rlmt.modules import RLMTModule
from rlmt.modules.base import TrainingModule
from rlmt.rewards import ClassifierReward

CUDA_CONTEXT = 3 * GIB // 4
"""Assumed: the CUDA context and memory of CUDA libraries."""
VLLM_OVERHEAD = GIB
"""Assumed: memory of vLLM besides weights, activations, CUDA graphs and cache, such as workspaces of its kernels."""
CUDA_GRAPHS = GIB // 2
"""Assumed: vLLM's CUDA graphs, which it estimates and deducts from its cache, and which stay while it sleeps."""

_BYTES_PER_WEIGHT = {"fp8_per_tensor": 1.0, "fp8_per_channel": 1.0, "mxfp4": 17 / 32}
"""By vLLM's online quantization method, for linear layers; the 4-bit one has a scale for 32 weights."""


def make_budget(
    module: RLMTModule,
    data: RolloutDataModule,
    compute: torch.dtype,
    memory: int,
    devices: Parallelism | None = None,
    activations: bool = True,
) -> Budget:
    """Computes the budget of a run on one of its devices.

    Args:
        module: RL module with its options; no weights are loaded into it.
        data: Data module with its engine.
        compute: dtype of the forward.
        memory: Memory of the device in bytes.
        devices: Number of devices and sharding; None is a single device.
        activations: False leaves out activations and working memory, which take seconds to measure.

    Raises:
        UserError: The config of a model cannot be read or is of the wrong kind, or the adapter cannot be built or
            served.
    """
    budget, devices = Budget(memory), devices or Parallelism()
    loading.check_policy(model_config(module.policy_path), module.policy_path)
    _add_policy(budget, module, data, compute, devices, activations)
    _add_rewards(budget, module, data, devices, activations)
    _add_engine(budget, module, data, compute, devices)
    budget.lines.append(BudgetLine.all_phases("CUDA context (assumed)", CUDA_CONTEXT))
    _check_vllm(budget, data.max_prompt_tokens + data.max_new_tokens)
    return budget


def _add_policy(
    budget: Budget,
    module: RLMTModule,
    data: RolloutDataModule,
    compute: torch.dtype,
    devices: Parallelism,
    activations: bool,
) -> None:
    """Adds the policy, adapters, critic and reference, and everything that training them takes."""
    lora, quantization = adapter_options(module)
    config, add = model_config(module.policy_path), budget.lines.append
    dtype = torch.float32 if lora is None else compute
    policy = meta_policy(module, dtype)
    trained: list[Tensor] = [p for p in policy.parameters() if p.requires_grad]
    base = meta_from_config(AutoModelForCausalLM, config, dtype)
    if quantization is None:
        size = weight_bytes(base)
    else:
        size = weight_bytes(base, quantized_weights(config), quantization.double_quant)
    add(BudgetLine.all_phases(f"policy weights ({describe(base, dtype, quantization)})", devices.shard_bytes(size)))
    if lora is not None:
        add(BudgetLine.all_phases(f"LoRA adapter (rank {lora.rank})", tensor_bytes(trained)))
    elif module.algorithm.needs_reference:
        reference = size
        if compute is torch.bfloat16:
            reference = weight_bytes(
                cast_linear_weights(meta_from_config(AutoModelForCausalLM, config, dtype), compute)
            )
        name = f"reference weights ({describe(base, compute, None)})"
        add(BudgetLine.all_phases(name, devices.shard_bytes(reference)))

    shape = largest_micro_batch(
        module.tokens_per_micro_batch,
        data.max_prompt_tokens,
        data.max_new_tokens,
        data.batch_size * data.group_size // (module.algorithm.minibatches * devices.ranks),
        data.group_size,
        shared_prefix=shares_cache(config)
        and not (module.gradient_checkpointing or devices.sharded or module.attn_implementation == VARLEN)
        and data.group_size > 1,
    )
    autocast = compute if compute is not torch.float32 else None
    gathered = all_gather_bytes(policy, compute)
    if devices.bf16_residual:
        round_residual_stream(policy)
    footprint = update_footprint(policy, shape, autocast, memory=budget.memory) if activations else Footprint(0, 0)
    critic, critic_footprint = meta_critic(module, dtype, shape, autocast, activations, devices.bf16_residual)
    if critic_options := module.algorithm.critic:
        # A copy of a 4-bit policy is in 4 bits, too; a critic from another model is not.
        is_copy = critic_options.init == "policy" and not critic_options.shared
        weights = tensor_bytes(critic) - (weight_bytes(base) - size if is_copy else 0)
        adapter = tensor_bytes(p for p in critic if p.requires_grad) if lora is not None else 0
        add(BudgetLine.all_phases("critic weights", devices.shard_bytes(weights - adapter) + adapter))
        trained += [p for p in critic if p.requires_grad]
    logits = logits_bytes(shape.rows * shape.completion, output_head(base), compute, budget.memory)
    peak = max(footprint.peak, critic_footprint.peak)
    add_update(budget, module, devices, trained, Update(shape, footprint.saved, peak, logits, gathered), base, compute)


@dataclass(frozen=True)
class Update:
    """Bytes of the forward and backward of the largest micro-batch."""

    shape: BatchShape
    """Size of the micro-batch."""
    saved: int
    """Bytes that autograd saves for backward."""
    peak: int
    """Maximum number of bytes alive at any time."""
    logits: int
    """Bytes of a chunk of logits and its gradients; part of the peak."""
    gathered: int
    """Bytes that FSDP2 holds unsharded."""


def add_update(
    budget: Budget,
    module: TrainingModule,
    devices: Parallelism,
    trained: Sequence[Tensor],
    update: Update,
    base: PreTrainedModel,
    compute: torch.dtype,
) -> None:
    """Adds optimizer states, gradients and the memory of an update.

    Args:
        budget: Budget with the weights.
        module: Module with its options.
        devices: Number of devices and sharding.
        trained: Trained parameters.
        update: Memory of the largest micro-batch.
        base: Model without adapters, on the meta device.
        compute: dtype of the forward.
    """
    lora, quantization = adapter_options(module)
    add = budget.lines.append
    per_device = devices.shard_bytes if lora is None else int  # adapters are not sharded
    add(BudgetLine.all_phases("optimizer states", per_device(optimizer_bytes(module.optimizer_factory, trained))))
    add(BudgetLine("gradients", update=per_device(tensor_bytes(trained))))
    if devices.sharded:
        add(BudgetLine("all-gathered blocks", update=update.gathered))
    elif devices.ranks > 1:
        add(BudgetLine.all_phases("DDP gradient buckets", tensor_bytes(trained)))
    rows, length = update.shape.rows, update.shape.row_length
    add(BudgetLine(f"activations ({rows} × {length} tokens)", update=update.saved))
    if update.logits:
        add(BudgetLine("logits chunk", update=update.logits))
    step = per_device(optimizer_step_bytes(module.optimizer_factory, trained))
    rest = max(update.peak, step) - update.saved - update.logits
    if quantization is not None:  # a 4-bit layer dequantizes its weight to compute
        largest = max((p.numel() for name, p in base.named_parameters() if ".layers." in name), default=0)
        rest += largest * compute.itemsize
    add(BudgetLine("working memory", update=max(rest, 0)))


def _add_rewards(
    budget: Budget, module: RLMTModule, data: RolloutDataModule, devices: Parallelism, activations: bool
) -> None:
    """Adds the weights of all reward models, held-out ones included, and the largest of their forwards."""
    forward, training_rewards = 0, list(module.reward.modules())
    # Held-out reward models are loaded together with the policy and stay loaded.
    for reward in (*training_rewards, *module.held_out.modules()):
        if not isinstance(reward, ClassifierReward):
            continue
        config = model_config(reward.source)
        stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        dtype = stored if reward.dtype == "auto" else cast(torch.dtype, getattr(torch, reward.dtype))
        quantization = getattr(reward, "quantization", None)
        model = meta_from_config(AutoModelForSequenceClassification, config, dtype)
        quantized: frozenset[str] = frozenset()
        if quantization is not None:
            quantized = quantized_weights(config, AutoModelForSequenceClassification)
        size = weight_bytes(model, quantized, quantization is not None and quantization.double_quant)
        kind = "reward weights" if reward in training_rewards else "held-out reward weights"
        per_device, gathered = size, 0
        if quantization is None:
            per_device = devices.shard_bytes(size)
            gathered = all_gather_bytes(model.requires_grad_(False), dtype) if devices.sharded else 0
        budget.lines.append(BudgetLine.all_phases(f"{kind} ({describe(model, dtype, quantization)})", per_device))
        length = min(
            reward.max_length or loading.max_positions(config),
            reward.tokens_per_batch,
            data.max_prompt_tokens + data.max_new_tokens,
        )
        samples = data.batch_size * data.group_size // devices.ranks
        rows = min(max(1, reward.tokens_per_batch // length), max(1, samples))
        forward = max(forward, gathered + (forward_footprint(model, rows, length).peak if activations else 0))
    if forward:
        budget.lines.append(BudgetLine("reward forward", reward=forward))


def _add_engine(
    budget: Budget, module: RLMTModule, data: RolloutDataModule, compute: torch.dtype, devices: Parallelism
) -> None:
    """Adds the weights and KV cache of the engine."""
    engine = data.engine
    if isinstance(engine, TransformersEngine):
        tokens = max(engine.tokens_per_batch, data.max_prompt_tokens + data.max_new_tokens)
        cache = tokens * kv_bytes(model_config(module.policy_path), compute)
        budget.lines.append(BudgetLine(f"KV cache ({tokens:,} tokens)", rollout=cache))
    elif isinstance(engine, VLLMEngine):
        _add_vllm(budget, engine, module, data, compute, devices)
    else:
        budget.notes.append(f"{type(engine).__name__} is assumed to take no memory on this device.")


def _add_vllm(
    budget: Budget,
    engine: VLLMEngine,
    module: RLMTModule,
    data: RolloutDataModule,
    compute: torch.dtype,
    devices: Parallelism,
) -> None:
    """Adds vLLM in process, with a note on the samples that its cache holds."""
    config, length = model_config(module.policy_path), data.max_prompt_tokens + data.max_new_tokens
    dtype = compute if engine.dtype is None else cast(torch.dtype, getattr(torch, engine.dtype))
    tensor_parallel_size = engine.tensor_parallel_size
    check_ranks(tensor_parallel_size, devices.ranks)
    engine.check_policy(config)
    quantization = getattr(engine, "quantization", None)
    weights = _vllm_weight_bytes(config, dtype, quantization) // tensor_parallel_size
    lora, _ = adapter_options(module)
    if lora is not None:
        engine.check_adapter(lora.config(meta_from_config(AutoModelForCausalLM, config, dtype)))
        adapter = [p for p in meta_policy(module, dtype).parameters() if p.requires_grad]
        weights += sum(p.numel() for p in adapter) * dtype.itemsize
    graphs = 0 if engine.enforce_eager else CUDA_GRAPHS
    activations = vllm_activation_bytes(config, dtype, engine.max_num_batched_tokens, engine.max_num_seqs)
    besides = weights + activations + graphs + VLLM_OVERHEAD
    cache = max(round(engine.gpu_memory_utilization * budget.memory) - besides, 0)
    line = (lambda name, size: BudgetLine(name, rollout=size)) if engine.sleep else BudgetLine.all_phases
    budget.lines.append(line(f"vLLM weights ({_dtype_name(quantization or dtype)})", weights))
    budget.lines.append(line("vLLM KV cache (granted)", cache))
    budget.lines.append(line(f"vLLM activations ({engine.max_num_batched_tokens} tokens)", activations))
    budget.lines.append(BudgetLine.all_phases("vLLM overhead (assumed)", graphs + VLLM_OVERHEAD))
    token_bytes = max(1, kv_bytes(config, dtype, tensor_parallel_size))
    sequences = min(engine.max_num_seqs, data.batch_size * data.group_size * tensor_parallel_size // devices.ranks)
    phases: tuple[Phase, ...] = ("rollout",) if engine.sleep else PHASES
    budget.vllm = VLLMShare(engine.gpu_memory_utilization, besides, cache, length * token_bytes, phases)
    if (tokens := cache // token_bytes) >= length:
        budget.notes.append(
            f"vLLM's KV cache holds {tokens:,} tokens: {tokens // length:,} samples of the maximum length "
            f"({length:,}), or up to {sequences:,} shorter ones, at a time."
        )


def _check_vllm(budget: Budget, length: int) -> None:
    """Adds what `gpu_memory_utilization` can be: a note, or a problem if its value does not work.

    Args:
        budget: The budget, complete otherwise.
        length: Maximum tokens of a prompt and its completion.
    """
    if budget.vllm is None:
        return
    least, most = budget.vllm_limits()
    if least > most:
        budget.problems.append(
            f"vLLM's weights and one sample of {length:,} tokens take {least:.2f} of the memory, and the trainer "
            f"leaves {max(most, 0):.2f}: no value of data.engine.gpu_memory_utilization fits."
        )
    elif budget.vllm.cache < budget.vllm.sample:
        budget.problems.append(
            f"vLLM's KV cache cannot hold one sample of {length:,} tokens: set data.engine.gpu_memory_utilization to a "
            f"value from {least:.2f} to {most:.2f}."
        )
    else:
        trainer = max(budget.trainer(phase) for phase in budget.vllm.phases)
        budget.notes.append(
            f"The trainer takes {format_gib(trainer)} GiB: data.engine.gpu_memory_utilization is "
            f"{budget.vllm.granted:.2f} and can be at most {most:.2f}."
        )


def _vllm_weight_bytes(config: PretrainedConfig, dtype: torch.dtype, quantization: str | None) -> int:
    """Bytes of the policy's weights in vLLM.

    Raises:
        UserError: The size of a weight under this quantization is not known.
    """
    model = meta_from_config(AutoModelForCausalLM, config, dtype)
    size = weight_bytes(model)
    if quantization is None:
        return size
    if quantization not in _BYTES_PER_WEIGHT:
        raise UserError(
            f"--data.engine.quantization {quantization}: `rlmt plan` does not know the size of its weights; choose one "
            f"of {', '.join(_BYTES_PER_WEIGHT)}."
        )
    layers = cast(nn.Module, cast(Any, model).get_decoder()).modules()
    weights = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    return size - round(weights * (dtype.itemsize - _BYTES_PER_WEIGHT[quantization]))


def describe(model: PreTrainedModel, dtype: torch.dtype, quantization: object | None) -> str:
    """Number of parameters and dtype of a model."""
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    return f"{billions:.2f}B, {_dtype_name(dtype) if quantization is None else 'NF4'}"


def _dtype_name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def format_gib(size: float) -> str:
    """Bytes as GiB with two decimals."""
    return f"{size / GIB:.2f}"
