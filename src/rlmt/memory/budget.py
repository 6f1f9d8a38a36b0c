"""The memory budget of a run on each of its devices: weights, what trains them, activations, caches, phase by phase.

Weights, adapters, gradients and optimizer states are counted from the models' configs; activations come from running
the trainer's code without data (`rlmt.memory.activations`); what vLLM takes is what it is granted. Two figures are
assumed, and their names say so.

Left out: fragmentation of torch's allocator, and memory of the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from rlmt.data import RolloutDataModule
from rlmt.engines import TransformersEngine, VLLMEngine
from rlmt.engines.vllm.tensor_parallel import check_ranks
from rlmt.errors import UserError
from rlmt.memory.activations import BatchShape, Footprint, forward_footprint, update_footprint
from rlmt.memory.bytes import (
    Devices,
    gathered_bytes,
    head_of,
    kv_bytes,
    largest_shard,
    logits_bytes,
    optimizer_bytes,
    step_bytes,
    tensor_bytes,
    weight_bytes,
)
from rlmt.models import loading
from rlmt.models.micro_batch import hidden_states
from rlmt.models.quantization import quantized_weights
from rlmt.modules import RLMTModule
from rlmt.rewards import ClassifierReward

GIB = 2**30
CONTEXT = 3 * GIB // 4
"""Assumed: the CUDA context and the libraries' own memory."""
VLLM_REST = GIB
"""Assumed: what vLLM holds beside weights and cache; its CUDA graphs stay while it sleeps."""

Phase = Literal["rollout", "reward", "update"]
PHASES: tuple[Phase, ...] = ("rollout", "reward", "update")

_ENGINE_WEIGHT = {"fp8_per_tensor": 1.0, "fp8_per_channel": 1.0, "mxfp4": 17 / 32}
"""Bytes of a linear layer's weight in the formats that vLLM can round to; 4-bit ones have a scale for 32 weights."""


@dataclass(frozen=True)
class Part:
    """One line of the budget, in bytes."""

    name: str
    rollout: int = 0
    reward: int = 0
    update: int = 0

    @classmethod
    def always(cls, name: str, size: int) -> Part:
        """Something that stays through all phases."""
        return cls(name, size, size, size)


@dataclass
class Budget:
    """What a run holds on one device."""

    memory: int
    """Bytes that the device has."""
    parts: list[Part] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Why the run cannot start although the sums may be small enough."""

    def total(self, phase: Phase) -> int:
        """Bytes held in a phase."""
        return sum(getattr(part, phase) for part in self.parts)

    @property
    def peak(self) -> Phase:
        """The phase that holds the most."""
        return max(PHASES, key=self.total)

    @property
    def fits(self) -> bool:
        """Whether every phase fits."""
        return not self.problems and self.total(self.peak) <= self.memory


def make_budget(
    module: RLMTModule, data: RolloutDataModule, compute: torch.dtype, memory: int, spread: Devices | None = None
) -> Budget:
    """The budget of a run on one of its devices.

    Args:
        module: with its options; nothing is loaded into it.
        data: with its engine.
        compute: number format of the forward.
        memory: bytes that the device has.
        spread: over which devices the run is spread; None is one.

    Raises:
        UserError: the config of a model cannot be read or is one of something else, or the adapter cannot be made or
            served.
    """
    budget, spread = Budget(memory), spread or Devices()
    loading.check_causal_lm(module.policy_config, module.policy_path)
    _add_policy(budget, module, data, compute, spread)
    _add_reward(budget, module, data, spread)
    _add_engine(budget, module, data, compute, spread)
    budget.parts.append(Part.always("CUDA context (assumed)", CONTEXT))
    return budget


def _add_policy(
    budget: Budget, module: RLMTModule, data: RolloutDataModule, compute: torch.dtype, spread: Devices
) -> None:
    """Policy, adapters, critic, reference, and all that training them takes."""
    lora, quantization = _adapter_options(module)
    config, add = module.policy_config, budget.parts.append
    held = torch.float32 if lora is None else compute
    policy = _policy(module, held)
    trained: list[Tensor] = [p for p in policy.parameters() if p.requires_grad]
    base = _meta(AutoModelForCausalLM, config, held)
    if quantization is None:
        size = weight_bytes(base)
    else:
        size = weight_bytes(base, quantized_weights(config), quantization.double_quant)
    add(Part.always(f"policy weights ({_how(base, held, quantization)})", spread.held(size)))
    if lora is not None:
        add(Part.always(f"LoRA adapter (rank {lora.rank})", tensor_bytes(trained)))
    elif module.algorithm.needs_reference:
        add(Part.always(f"reference weights ({_how(base, held, None)})", spread.held(size)))

    steps = module.algorithm.minibatches
    tokens = largest_shard(
        module.tokens_per_micro_batch,
        data.max_prompt_tokens,
        data.max_new_tokens,
        data.batch_size * data.group_size // (steps * spread.ranks),
        data.group_size,
        shared=not (module.gradient_checkpointing or spread.sharded) and data.group_size > 1,
    )
    autocast = compute if compute is not torch.float32 else None
    together = gathered_bytes(policy, compute)
    footprint = update_footprint(policy, tokens, autocast)
    critic, values = _critic(module, held, tokens, autocast)
    if wanted := module.algorithm.critic:
        # A copy of a policy in 4 bits is in 4 bits, too; a critic from another model is not.
        copied = wanted.init == "policy" and not wanted.shared
        weights = tensor_bytes(critic) - (weight_bytes(base) - size if copied else 0)
        own = tensor_bytes(p for p in critic if p.requires_grad) if lora is not None else 0
        add(Part.always("critic weights", spread.held(weights - own) + own))
        trained += [p for p in critic if p.requires_grad]
    kept = spread.held if lora is None else int  # adapters are whole on every device
    add(Part.always("optimizer states", kept(optimizer_bytes(module.optimizer_factory, trained))))
    add(Part("gradients", update=kept(tensor_bytes(trained))))
    if spread.sharded:
        add(Part("blocks put together", update=together))
    elif spread.ranks > 1:
        add(Part.always("DDP's buffers", tensor_bytes(trained)))

    add(Part(f"activations ({tokens.rows} × {_length(tokens)} tokens)", update=footprint.kept))
    logits = logits_bytes(tokens.rows * tokens.completion, head_of(base), compute)
    add(Part("logits chunk", update=logits))
    rest = (
        max(footprint.peak, values.peak, kept(step_bytes(module.optimizer_factory, trained))) - footprint.kept - logits
    )
    largest = max((p.numel() for name, p in base.named_parameters() if ".layers." in name), default=0)
    # A 4-bit layer makes its weight in full when it computes.
    rest += 0 if quantization is None else largest * compute.itemsize
    add(Part("working memory", update=max(rest, 0)))


def _adapter_options(module: RLMTModule) -> tuple[Any, Any]:
    """LoRA and 4-bit options of the policy, or None."""
    return getattr(module, "lora", None), getattr(module, "quantization", None)


def _policy(module: RLMTModule, held: torch.dtype, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """The policy as it is trained, or another model trained so, without data; 4-bit layers stand there in full."""
    lora, _ = _adapter_options(module)
    # Other kernels than the eager one keep as much as torch's own, and may not be there to ask.
    eager = {"attn_implementation": "eager"} if module.attn_implementation == "eager" else {}
    policy = _meta(AutoModelForCausalLM, config or module.policy_config, held, **eager)
    if lora is not None:
        policy.requires_grad_(False)
        options = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.targets(policy),
            use_dora=lora.dora,
            use_rslora=lora.rslora,
        )
        policy.add_adapter(options, adapter_name="default")
        for module_ in policy.modules():
            for name, parameter in list(module_._parameters.items()):
                if parameter is not None and parameter.requires_grad:
                    module_._parameters[name] = nn.Parameter(parameter.float())
    policy.train()
    if module.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    return policy


def _critic(
    module: RLMTModule, held: torch.dtype, tokens: BatchShape, autocast: torch.dtype | None
) -> tuple[list[Tensor], Footprint]:
    """Parameters of the critic on the meta device and its footprint; none for objectives without one."""
    options = module.algorithm.critic
    if options is None:
        return [], Footprint(0, 0)
    same = options.shared or options.init == "policy"
    model = _policy(module, held, None if same else loading.load_config(options.init))
    lora, _ = _adapter_options(module)
    if options.shared:
        # The value head reads the policy's backbone; under LoRA through an adapter of its own.
        own = [] if lora is None else [p for p in model.parameters() if p.requires_grad]
    else:
        own = list(cast(nn.Module, cast(Any, model).get_decoder()).parameters())
    head = torch.empty(cast(Any, model.config).get_text_config().hidden_size + 1, device="meta", requires_grad=True)
    footprint = update_footprint(
        model, tokens, autocast, lambda model, batch: hidden_states(model.get_decoder(), batch).float().sum(1)
    )
    return [*own, head], footprint


def _add_reward(budget: Budget, module: RLMTModule, data: RolloutDataModule, spread: Devices) -> None:
    """Every classifier among the rewards, held-out ones too: its weights, and a forward of the largest."""
    work, trained = 0, list(module.reward.modules())
    for reward in (*trained, *module.held_out.modules()):  # both are loaded with the policy, and stay
        if not isinstance(reward, ClassifierReward):
            continue
        config = loading.load_config(reward.source)
        stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        dtype = stored if reward.dtype == "auto" else cast(torch.dtype, getattr(torch, reward.dtype))
        quantization = getattr(reward, "quantization", None)
        model = _meta(AutoModelForSequenceClassification, config, dtype)
        packed: frozenset[str] = frozenset()
        if quantization is not None:
            packed = quantized_weights(config, AutoModelForSequenceClassification)
        size = weight_bytes(model, packed, quantization is not None and quantization.double_quant)
        kind = "reward weights" if reward in trained else "held-out reward weights"
        held = spread.held(size) if quantization is None else size
        together = gathered_bytes(model.requires_grad_(False), dtype) if spread.sharded and quantization is None else 0
        budget.parts.append(Part.always(f"{kind} ({_how(model, dtype, quantization)})", held))
        length = min(
            reward.max_length or loading.max_positions(config),
            reward.tokens_per_batch,
            data.max_prompt_tokens + data.max_new_tokens,
        )
        samples = data.batch_size * data.group_size // spread.ranks
        rows = min(max(1, reward.tokens_per_batch // length), max(1, samples))
        work = max(work, together + forward_footprint(model, rows, length).peak)
    if work:
        budget.parts.append(Part("reward forward", reward=work))


def _add_engine(
    budget: Budget, module: RLMTModule, data: RolloutDataModule, compute: torch.dtype, spread: Devices
) -> None:
    """The engine's weights and cache."""
    engine, config = data.engine, module.policy_config
    length = data.max_prompt_tokens + data.max_new_tokens
    if isinstance(engine, TransformersEngine):
        room = max(engine.tokens_per_batch, length)
        budget.parts.append(Part(f"KV cache ({room:,} tokens)", rollout=room * kv_bytes(config, compute)))
        return
    if not isinstance(engine, VLLMEngine):
        budget.remarks.append(f"{type(engine).__name__} is taken to hold nothing on this device.")
        return
    dtype = compute if engine.dtype is None else cast(torch.dtype, getattr(torch, engine.dtype))
    parts = engine.tensor_parallel_size
    check_ranks(parts, spread.ranks)
    engine.check_policy(config)
    size = _engine_weights(config, dtype, getattr(engine, "quantization", None)) // parts
    lora, _ = _adapter_options(module)
    if lora is not None:
        engine.check_adapter(lora.config(_meta(AutoModelForCausalLM, config, dtype)))
        adapter = [p for p in _policy(module, dtype).parameters() if p.requires_grad]
        size += sum(p.numel() for p in adapter) * dtype.itemsize
    granted = round(engine.gpu_memory_utilization * budget.memory) - size - VLLM_REST
    each = kv_bytes(config, dtype, parts)
    held = (lambda name, size: Part(name, rollout=size)) if engine.sleep else Part.always
    budget.parts.append(held(f"vLLM weights ({_name(getattr(engine, 'quantization', None) or dtype)})", size))
    budget.parts.append(held("vLLM KV cache (granted)", max(granted, 0)))
    budget.parts.append(Part.always("vLLM, the rest (assumed)", VLLM_REST))
    wanted = min(engine.max_num_seqs, data.batch_size * data.group_size * parts // spread.ranks)
    tokens = max(granted, 0) // each
    if tokens < length:
        least = (size + VLLM_REST + length * each) / budget.memory
        budget.problems.append(
            f"vLLM's cache cannot hold one sample of {length:,} tokens: data.engine.gpu_memory_utilization would have "
            f"to be at least {least:.2f}."
        )
    else:
        budget.remarks.append(
            f"vLLM's cache holds {tokens:,} tokens: {tokens // length:,} samples of the greatest length ({length:,}) "
            f"at a time; it decodes up to {wanted:,} while they are shorter."
        )
    beside = budget.total("rollout") - max(granted, 0) - size - VLLM_REST + CONTEXT
    share = (budget.memory - beside) / budget.memory
    budget.remarks.append(
        f"Beside the trainer's {gib(beside)} GiB, data.engine.gpu_memory_utilization may be up to {share:.2f}."
        if share > 0
        else "The trainer alone leaves vLLM no room."
    )


def _engine_weights(config: PretrainedConfig, dtype: torch.dtype, quantization: str | None) -> int:
    model = _meta(AutoModelForCausalLM, config, dtype)
    size = weight_bytes(model)
    if quantization is None:
        return size
    if quantization not in _ENGINE_WEIGHT:
        raise UserError(
            f"--data.engine.quantization {quantization}: `rlmt plan` does not know how many bytes it takes."
        )
    layers = cast(nn.Module, cast(Any, model).get_decoder()).modules()
    weights = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    return size - round(weights * (dtype.itemsize - _ENGINE_WEIGHT[quantization]))


def _meta(auto: Any, config: PretrainedConfig, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """The model of a config without data."""
    with torch.device("meta"):
        return cast(PreTrainedModel, auto.from_config(config, dtype=dtype, **options))


def _how(model: PreTrainedModel, dtype: torch.dtype, quantization: Any) -> str:
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    return f"{billions:.2f}B, {_name(dtype) if quantization is None else 'NF4'}"


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _length(tokens: BatchShape) -> int:
    return tokens.completion - 1 + (0 if tokens.shared else tokens.prompt)


def gib(size: float) -> str:
    """Bytes as GiB with two decimals."""
    return f"{size / GIB:.2f}"
