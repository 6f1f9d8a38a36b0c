"""Log-probs, entropies and values of sampled tokens: with gradients for a micro-batch, without for a rollout batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlmt.annotations import PreTrainedModel
from rlmt.distributed.fsdp2 import call_as_forward, pad_with_no_ops
from rlmt.models.critic import Critic
from rlmt.models.micro_batch import (
    MicroBatch,
    hidden_states,
    micro_batches,
    no_op_micro_batch,
    shares_prompts,
    token_offsets,
    token_positions,
)
from rlmt.models.output_head import device_memory, linear_logprobs, output_head, rows_per_chunk
from rlmt.models.rows import packs_rows
from rlmt.models.training_mode import eval_mode
from rlmt.progress import track
from rlmt.types import PolicyOutputs, RolloutBatch


def token_logprobs(model: PreTrainedModel, batch: MicroBatch, temperature: float) -> PolicyOutputs:
    """Computes the log-prob and entropy of every completion token of a micro-batch at the sampling temperature.

    The output projection is applied only to the positions that predict completion tokens, a chunk at a time.

    Args:
        model: The policy.
        batch: Micro-batch with t completion tokens.
        temperature: Sampling temperature, > 0.

    Returns:
        [t] float32 each, in nats, with gradients if they are enabled.
    """
    return PolicyOutputs(*call_as_forward(model, _token_logprobs, batch, temperature))


def _token_logprobs(model: Any, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    hidden = hidden_states(model.get_decoder(), batch)
    head = output_head(model)
    chunk = rows_per_chunk(head.weight.shape[0], device_memory(hidden.device))
    outputs = linear_logprobs(hidden, head, batch.targets, temperature, chunk)
    return outputs.logprobs, outputs.entropy


@torch.no_grad()
def compute_logprobs(
    model: PreTrainedModel,
    rollouts: RolloutBatch,
    budget: int,
    device: torch.device,
    temperature: float | None = None,
    samples: Sequence[int] | None = None,
) -> Tensor:
    """Computes the log-probs of sampled tokens under a model, without gradients and in eval mode.

    Args:
        model: The policy or the reference.
        rollouts: Rollout batch with T completion tokens.
        budget: Maximum number of tokens in one forward pass, padding included.
        device: Device of the model.
        temperature: Temperature of the log-probs; None is the sampling temperature.
        samples: Indices of the samples to compute; None is all of them.

    Returns:
        [T] float32; NaN for tokens of other samples.
    """
    at = rollouts.sampling.temperature if temperature is None else temperature
    return _per_token(rollouts, budget, model, device, lambda batch: token_logprobs(model, batch, at).logprobs, samples)


@torch.no_grad()
def compute_values(critic: Critic, rollouts: RolloutBatch, budget: int, device: torch.device) -> Tensor:
    """Computes the critic's values of all states in which a token was sampled, without gradients and in eval mode.

    Args:
        critic: The critic.
        rollouts: Rollout batch with T completion tokens.
        budget: Maximum number of tokens in one forward pass, padding included.
        device: Device of the critic.

    Returns:
        [T] float32.
    """
    return _per_token(rollouts, budget, critic.backbone, device, critic)


def _per_token(
    rollouts: RolloutBatch,
    budget: int,
    model: PreTrainedModel,
    device: torch.device,
    function: Callable[[MicroBatch], Tensor],
    samples: Sequence[int] | None = None,
) -> Tensor:
    """Applies a function, which returns [t] of a micro-batch, to a rollout batch: [T] float32."""
    offsets = token_offsets(torch.tensor(rollouts.lengths))
    out = torch.full((sum(rollouts.lengths),), math.nan, dtype=torch.float32, device=device)
    selected = range(len(rollouts)) if samples is None else samples
    with eval_mode(model):  # disables dropout, and gradient checkpointing, which is useless without a backward
        share, packed = shares_prompts(model), packs_rows(model)
        batches = micro_batches(rollouts, selected, budget, share, device, packed=packed)
        for batch in track("computing log-probs", pad_with_no_ops(batches, model, no_op_micro_batch(device))):
            values = function(batch)
            if batch.samples:
                out[token_positions(batch.samples, offsets, rollouts.lengths).to(device)] = values
    return out
