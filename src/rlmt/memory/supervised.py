"""The memory budget of SFT and of reward-model training: one phase, the update."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlmt.data import PreferenceDataModule, SFTDataModule
from rlmt.distributed.fsdp2 import round_residual_stream
from rlmt.memory.activations import BatchShape, update_footprint
from rlmt.memory.budget import CUDA_CONTEXT, Update, add_update, describe
from rlmt.memory.bytes import (
    Parallelism,
    all_gather_bytes,
    logits_bytes,
    tensor_bytes,
    weight_bytes,
)
from rlmt.memory.known_models import model_config
from rlmt.memory.meta_models import adapter_options, meta_from_config, meta_trained
from rlmt.memory.records import Budget, BudgetLine
from rlmt.models import loading
from rlmt.models.micro_batch import MicroBatch
from rlmt.models.output_head import output_head
from rlmt.models.quantization import quantized_weights
from rlmt.models.reward_model import as_reward_config, score_states
from rlmt.modules import SFT, RewardModeling


def make_supervised_budget(
    module: SFT | RewardModeling,
    data: SFTDataModule | PreferenceDataModule,
    compute: torch.dtype,
    memory: int,
    devices: Parallelism,
) -> Budget:
    """Computes the budget of a run on one of its devices, with rows of the maximum length.

    Args:
        module: Module with its options; no weights are loaded into it.
        data: Data module with its options; no rows are read.
        compute: dtype of the forward.
        memory: Memory of the device in bytes.
        devices: Number of devices and sharding.

    Raises:
        UserError: The config of the model cannot be read or is of the wrong kind, or the adapter cannot be built.
    """
    budget = Budget(memory, phases=("update",))
    lora, quantization = adapter_options(module)
    dtype = torch.float32 if lora is None else compute
    auto: Any = AutoModelForSequenceClassification
    if isinstance(module, SFT):
        config = model_config(module.policy_path)
        loading.check_causal_lm(config, module.policy_path)
        auto = AutoModelForCausalLM
    else:
        config = as_reward_config(model_config(module.model_path), module.model_path)
    model, base = meta_trained(module, auto, config, dtype), meta_from_config(auto, config, dtype)
    if isinstance(module, RewardModeling):
        cast(Any, model).score.requires_grad_(True)
    quantized = frozenset[str]() if quantization is None else quantized_weights(config, auto)
    size = weight_bytes(base, quantized, quantization is not None and quantization.double_quant)
    name = "policy weights" if isinstance(module, SFT) else "reward model weights"
    trained = [p for p in model.parameters() if p.requires_grad]
    budget.lines.append(BudgetLine(f"{name} ({describe(base, dtype, quantization)})", update=devices.shard_bytes(size)))
    if lora is not None:
        budget.lines.append(BudgetLine(f"LoRA adapter (rank {lora.rank})", update=tensor_bytes(trained)))
    autocast = compute if compute is not torch.float32 else None
    length = min(data.max_length, loading.max_positions(config))
    shape = _largest_micro_batch(module, length, -(-data.batch_size // devices.ranks))
    gathered = all_gather_bytes(model, compute)
    logits = 0
    if devices.bf16_residual:
        round_residual_stream(model)
    if isinstance(module, SFT):
        footprint = update_footprint(model, shape, autocast, memory=memory)
        logits = logits_bytes(shape.rows * shape.completion, output_head(base), compute, memory)
    else:
        footprint = update_footprint(model, shape, autocast, _scores)
    update = Update(shape, footprint.saved, footprint.peak, logits, gathered)
    add_update(budget, module, devices, trained, update, base, compute)
    budget.lines.append(BudgetLine("CUDA context (assumed)", update=CUDA_CONTEXT))
    return budget


def _largest_micro_batch(module: SFT | RewardModeling, length: int, rows_per_step: int) -> BatchShape:
    """The micro-batch that fills the token budget with rows of the maximum length, all of whose tokens are targets."""
    if isinstance(module, SFT):
        rows = module.tokens_per_micro_batch // (length - 1)
        return BatchShape(max(1, min(rows, rows_per_step)), 1, length - 1, shared_prefix=False)
    pairs = module.tokens_per_micro_batch // (2 * length)
    return BatchShape(2 * max(1, min(pairs, rows_per_step)), 1, length, shared_prefix=False)


def _scores(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """The score of each row, as `last_token_states` and `score_states` compute it."""
    hidden = cast(Any, model).base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return score_states(model, hidden[:, -1])
