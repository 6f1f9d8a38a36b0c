"""The models of a run on the meta device, configured as the run trains and loads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rlmt.distributed.fsdp2 import round_residual_stream
from rlmt.memory.activations import BatchShape, Footprint, forward_footprint, update_footprint
from rlmt.memory.known_models import model_config
from rlmt.models.adapters import is_adapter_layer
from rlmt.models.attention import attention_options
from rlmt.models.micro_batch import hidden_states
from rlmt.models.training_mode import set_training_mode
from rlmt.modules import SFT, RLMTModule
from rlmt.modules.base import TrainingModule


def meta_from_config(auto: Any, config: PretrainedConfig, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """A model on the meta device, without data.

    Args:
        auto: Auto class of transformers.
        config: Config of the model.
        dtype: dtype of its weights.
        **options: Further options of `from_config`.
    """
    with torch.device("meta"):
        return cast(PreTrainedModel, auto.from_config(config, dtype=dtype, **options))


def adapter_options(module: TrainingModule) -> tuple[Any, Any]:
    """LoRA and 4-bit options of the policy; None where it has none."""
    return getattr(module, "lora", None), getattr(module, "quantization", None)


def meta_policy(
    module: RLMTModule | SFT, dtype: torch.dtype, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """The policy as the module trains it, on the meta device; weights that the run quantizes are not quantized here.

    Args:
        module: RL or SFT module with its options.
        dtype: dtype in which the weights are stored; adapters are in float32.
        config: Config of another model that is trained with the same options.
    """
    return meta_trained(module, AutoModelForCausalLM, config or model_config(module.policy_path), dtype)


def meta_trained(module: TrainingModule, auto: Any, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model with the adapter, attention and gradient checkpointing of a module, on the meta device.

    Args:
        module: Module with its options.
        auto: Auto class of transformers.
        config: Config of the model.
        dtype: dtype in which the weights are stored; adapters are in float32.
    """
    lora, _ = adapter_options(module)
    # The other attention kernels save as much as torch's own, and may not be installed here.
    attention = attention_options(config, module.attn_implementation, str(config.name_or_path or config.model_type))
    eager = attention if attention.get("attn_implementation") == "eager" else {}
    policy = meta_from_config(auto, config, dtype, **eager)
    if lora is not None:
        from peft import LoraConfig  # takes seconds, and most runs have no adapter

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
        submodules: Iterator[Any] = policy.modules()
        for submodule in submodules:
            if is_adapter_layer(submodule):
                submodule.cast_input_dtype_enabled = lora.dora  # as in LoRA.add_to
            for name, parameter in list(submodule._parameters.items()):
                if parameter is not None and parameter.requires_grad:
                    submodule._parameters[name] = nn.Parameter(parameter.float())
    set_training_mode(policy, module.gradient_checkpointing, module.dropout)
    return policy


def meta_critic(
    module: RLMTModule,
    dtype: torch.dtype,
    shape: BatchShape,
    autocast: torch.dtype | None,
    activations: bool,
    bf16_residual: bool = False,
) -> tuple[list[Tensor], Footprint]:
    """Parameters of the critic on the meta device and the footprint of its update; empty without a critic.

    Args:
        module: RL module with its options.
        dtype: dtype in which the weights are stored.
        shape: Size of the largest micro-batch.
        autocast: dtype of the forward where it is not that of the weights.
        activations: Whether to measure the footprint; it is 0 otherwise.
        bf16_residual: As in `Parallelism`.
    """
    options = module.algorithm.critic
    if options is None:
        return [], Footprint(0, 0)
    from_policy = options.shared or options.init == "policy"
    model = meta_policy(module, dtype, None if from_policy else model_config(options.init))
    lora, _ = adapter_options(module)
    if options.shared:
        # The value head shares the policy's backbone; under LoRA it has an adapter of its own.
        own = [] if lora is None else [p for p in model.parameters() if p.requires_grad]
    else:
        own = list(cast(nn.Module, cast(Any, model).get_decoder()).parameters())
    head = torch.empty(cast(Any, model.config).get_text_config().hidden_size + 1, device="meta", requires_grad=True)
    if not activations:
        return [*own, head], Footprint(0, 0)
    if bf16_residual:
        round_residual_stream(model)
    footprint = update_footprint(
        model, shape, autocast, lambda model, batch: hidden_states(model.get_decoder(), batch).float().sum(1)
    )
    return [*own, head], footprint


def vllm_activation_bytes(config: PretrainedConfig, dtype: torch.dtype, tokens: int, samples: int) -> int:
    """Peak bytes of vLLM's forward, which it measures on dummy inputs at its start and deducts from its cache.

    Args:
        config: Config of the policy.
        dtype: dtype of the engine.
        tokens: Tokens of a forward (`max_num_batched_tokens`).
        samples: Samples decoded at once (`max_num_seqs`), which have a row of logits each: in the engine's dtype, and
            in float32 scaled, as log-probs and as probabilities.
    """
    model = meta_from_config(AutoModelForCausalLM, config, dtype)
    logits = samples * int(config.get_text_config().vocab_size) * (dtype.itemsize + 3 * 4)
    return max(forward_footprint(model, 1, tokens).peak, logits)
