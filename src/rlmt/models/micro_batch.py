"""Micro-batches of rollouts: which samples go through the policy in one forward pass.

Samples of one prompt share its forward and backward pass: the prompt goes through the policy once, and all its samples
use its keys and values. With 8 samples per prompt this leaves an eighth of the work on prompts, and the gradient is the
same. Every sample carries its own prompt where keys and values cannot be shared: with gradient checkpointing, in packed
rows, and in models with linear attention or other states in place of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlmt.annotations import PreTrainedModel
from rlmt.distributed.fsdp2 import is_sharded
from rlmt.models.cache import shares_cache
from rlmt.models.rows import Packing, group_rows, packs_rows, row_states, stack_rows
from rlmt.models.training_mode import recomputes_activations
from rlmt.types import RolloutBatch


@dataclass
class MicroBatch:
    """Samples as rows, padded on the right or packed, and the positions that predict their completion tokens."""

    samples: list[int]
    """b indices of samples in the rollout batch; empty in a no-op micro-batch, whose token does not count."""
    shared_prompt: Tensor | None
    """[1, n] int64 prompt of all samples; None if each row of `input_ids` starts with its own prompt."""
    input_ids: Tensor
    """[b, L] int64 (prompt and) completion without its last token, padded on the right; L can be 0. Packed [1, T]."""
    rows: Tensor
    """[t] int64 row of each completion token."""
    columns: Tensor
    """[t] int64 position in the row's hidden states that predicts it; position 0 is a shared prompt's last position."""
    targets: Tensor
    """[t] int64 completion tokens, sample after sample."""
    packing: Packing | None = None
    """How the rows are packed, if they are."""


def shares_prompts(model: PreTrainedModel) -> bool:
    """True if several samples can use one prompt's keys and values, with gradients if they are enabled."""
    if packs_rows(model) or recomputes_activations(model) or is_sharded(model):
        return False
    return shares_cache(model.config)


def no_op_micro_batch(device: torch.device) -> MicroBatch:
    """A micro-batch without samples, which keeps FSDP ranks in lockstep (`rlmt.distributed.fsdp2.pad_with_no_ops`)."""
    zero = torch.zeros(1, dtype=torch.long, device=device)
    return MicroBatch([], None, zero[None], zero, zero, zero)


def micro_batches(
    rollouts: RolloutBatch,
    samples: Sequence[int],
    budget: int,
    share_prompts: bool,
    device: torch.device,
    unit_size: int = 1,
    packed: bool = False,
) -> Iterator[MicroBatch]:
    """Splits samples into micro-batches of at most `budget` tokens, padding included; a single unit may exceed it.

    Args:
        rollouts: Rollout batch that holds the samples.
        samples: Indices of the samples to use, unit after unit.
        budget: Maximum number of tokens in a micro-batch, prompts and padding included.
        share_prompts: Whether samples of one prompt are batched together and share its forward pass.
        device: Device of the tensors.
        unit_size: Number of samples of one prompt that form a unit, which is never split: 2 for pairs.
        packed: Whether samples with prompts of their own are packed into one row, without padding.
    """
    units = [samples[k : k + unit_size] for k in range(0, len(samples), unit_size)]
    if not (share_prompts and rollouts.group_size > 1):
        lengths = [[len(_prompt(rollouts, i)) + len(rollouts.completion_ids[i]) - 1 for i in unit] for unit in units]
        for plan in group_rows(lengths, budget, packed, device):
            yield _with_own_prompts(rollouts, [i for k in plan for i in units[k]], packed, device)
        return
    groups: dict[int, list[Sequence[int]]] = {}
    for unit in units:
        groups.setdefault(unit[0] // rollouts.group_size, []).append(unit)
    for group in groups.values():
        prompt = _prompt(rollouts, group[0][0])
        lengths = [[len(rollouts.completion_ids[i]) for i in unit] for unit in group]
        for part in group_rows(lengths, max(1, budget - len(prompt)), False, device, len(prompt)):
            yield _with_shared_prompt(rollouts, [i for k in part for i in group[k]], prompt, device)


def hidden_states(decoder: Any, batch: MicroBatch) -> Tensor:
    """Computes the last hidden states that predict the completion tokens.

    Args:
        decoder: The model without its output projection.
        batch: Micro-batch with t completion tokens.

    Returns:
        [t, H] in the decoder's dtype.
    """
    if batch.shared_prompt is None:
        return row_states(decoder, batch.input_ids, batch.packing, batch.rows, batch.columns)
    prompt = decoder(input_ids=batch.shared_prompt, use_cache=True)
    size, width = batch.input_ids.shape
    hidden: Tensor = prompt.last_hidden_state[:, -1:].expand(size, -1, -1)
    if width:
        cache = prompt.past_key_values
        cache.batch_repeat_interleave(size)
        rest = decoder(input_ids=batch.input_ids, past_key_values=cache, use_cache=True).last_hidden_state
        hidden = torch.cat([hidden, rest], dim=1)
    return hidden[batch.rows, batch.columns]


def token_offsets(lengths: Tensor) -> Tensor:
    """Offset of each sample's first token in a flat token tensor: [B] int64 from [B] lengths."""
    return lengths.cumsum(0) - lengths


def token_positions(samples: list[int], offsets: Tensor, lengths: list[int]) -> Tensor:
    """Positions of the samples' tokens in a flat token tensor, in the order of `samples`.

    Args:
        samples: b indices of samples, at least one.
        offsets: [B] int64 from `token_offsets`, on the CPU.
        lengths: B completion lengths in tokens.

    Returns:
        [t] int64 on the CPU.
    """
    return torch.cat([torch.arange(int(offsets[i]), int(offsets[i]) + lengths[i]) for i in samples])


def _prompt(rollouts: RolloutBatch, sample: int) -> list[int]:
    return rollouts.prompt_ids[sample // rollouts.group_size]


def _with_own_prompts(rollouts: RolloutBatch, samples: list[int], packed: bool, device: torch.device) -> MicroBatch:
    prompts = [_prompt(rollouts, i) for i in samples]
    sequences = [torch.tensor(p + rollouts.completion_ids[i]) for p, i in zip(prompts, samples, strict=True)]
    return micro_batch_of_sequences(samples, sequences, [len(prompt) for prompt in prompts], packed, device)


def _with_shared_prompt(
    rollouts: RolloutBatch, samples: list[int], prompt: list[int], device: torch.device
) -> MicroBatch:
    sequences = [torch.tensor(prompt[-1:] + rollouts.completion_ids[i]) for i in samples]
    batch = micro_batch_of_sequences(samples, sequences, [1] * len(samples), False, device)
    ids = batch.input_ids[:, 1:].contiguous()  # the shared prompt has their first column
    return replace(batch, shared_prompt=torch.tensor([prompt], device=device), input_ids=ids)


def micro_batch_of_sequences(
    samples: list[int], sequences: Sequence[Tensor], first: Sequence[int], packed: bool, device: torch.device
) -> MicroBatch:
    """Makes rows of sequences.

    Args:
        samples: b indices of the sequences in their batch.
        sequences: b sequences of tokens, [n] of integers each, on the CPU.
        first: Position of the first completion token in each sequence; all later ones are completion tokens, too.
        packed: Whether to pack the rows; otherwise they are padded on the right.
        device: Device of the tensors.
    """
    ids, packing = stack_rows([sequence[:-1] for sequence in sequences], packed, device)
    counts = torch.tensor([len(sequence) - start for sequence, start in zip(sequences, first, strict=True)])
    columns = [torch.arange(start - 1, len(sequence) - 1) for sequence, start in zip(sequences, first, strict=True)]
    targets = [sequence[start:] for sequence, start in zip(sequences, first, strict=True)]
    return MicroBatch(
        samples=samples,
        shared_prompt=None,
        input_ids=ids,
        rows=torch.arange(len(sequences)).repeat_interleave(counts).to(device),
        columns=torch.cat(columns).to(device),
        targets=torch.cat(targets).long().to(device),
        packing=packing,
    )
