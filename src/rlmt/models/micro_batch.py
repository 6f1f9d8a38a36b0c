"""Micro-batches of rollouts: which samples go through the policy in one forward pass.

Samples of one prompt share its forward and backward pass: the prompt goes through the policy once, and all its samples
use its keys and values. With 8 samples per prompt this leaves an eighth of the work on prompts, and the gradient is the
same. Every sample carries its own prompt where keys and values cannot be shared: with gradient checkpointing, and in
models with linear attention or other states in place of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmt.annotations import PreTrainedModel
from rlmt.distributed.fsdp2 import is_sharded
from rlmt.models.cache import shares_cache
from rlmt.models.training_mode import recomputes_activations
from rlmt.types import RolloutBatch

_PASS_TOKENS = {"cpu": 128, "cuda": 1024}
"""Number of tokens that a model processes in about the fixed time of a forward and backward pass."""


@dataclass
class MicroBatch:
    """Samples padded on the right to one length, and the positions that predict their completion tokens."""

    samples: list[int]
    """b indices of samples in the rollout batch; empty in a no-op micro-batch, whose token does not count."""
    shared_prompt: Tensor | None
    """[1, n] int64 prompt of all samples; None if each row of `input_ids` starts with its own prompt."""
    input_ids: Tensor
    """[b, L] int64 (prompt and) completion without its last token, padded on the right; L can be 0."""
    rows: Tensor
    """[t] int64 row of each completion token."""
    columns: Tensor
    """[t] int64 position in the row's hidden states that predicts it; position 0 is a shared prompt's last position."""
    targets: Tensor
    """[t] int64 completion tokens, sample after sample."""


def shares_prompts(model: PreTrainedModel) -> bool:
    """True if several samples can use one prompt's keys and values, with gradients if they are enabled."""
    return shares_cache(model.config) and not recomputes_activations(model) and not is_sharded(model)


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
) -> Iterator[MicroBatch]:
    """Splits samples into micro-batches of at most `budget` tokens, padding included; a single unit may exceed it.

    Args:
        rollouts: Rollout batch that holds the samples.
        samples: Indices of the samples to use, unit after unit.
        budget: Maximum number of tokens in a micro-batch, prompts and padding included.
        share_prompts: Whether samples of one prompt are batched together and share its forward pass.
        device: Device of the tensors.
        unit_size: Number of samples of one prompt that form a unit, which is never split: 2 for pairs.
    """
    units = [samples[k : k + unit_size] for k in range(0, len(samples), unit_size)]
    if not (share_prompts and rollouts.group_size > 1):
        lengths = [
            len(_prompt(rollouts, unit[0])) + max(len(rollouts.completion_ids[i]) for i in unit) - 1 for unit in units
        ]
        for plan in batches_by_length(lengths, budget, device, unit_size):
            yield _with_own_prompts(rollouts, [i for k in plan for i in units[k]], device)
        return
    groups: dict[int, list[Sequence[int]]] = {}
    for unit in units:
        groups.setdefault(unit[0] // rollouts.group_size, []).append(unit)
    for group in groups.values():
        prompt = _prompt(rollouts, group[0][0])
        lengths = [max(len(rollouts.completion_ids[i]) for i in unit) for unit in group]
        for part in batches_by_length(lengths, max(1, budget - len(prompt)), device, unit_size, len(prompt)):
            yield _with_shared_prompt(rollouts, [i for k in part for i in group[k]], prompt, device)


def hidden_states(decoder: Any, batch: MicroBatch) -> Tensor:
    """Computes the last hidden states that predict the completion tokens.

    Args:
        decoder: The model without its output projection.
        batch: Micro-batch with t completion tokens.

    Returns:
        [t, H] in the decoder's dtype.
    """
    # Padding on the right needs no mask: causal attention does not look right.
    if batch.shared_prompt is None:
        hidden: Tensor = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        return hidden[batch.rows, batch.columns]
    prompt = decoder(input_ids=batch.shared_prompt, use_cache=True)
    size, width = batch.input_ids.shape
    hidden = prompt.last_hidden_state[:, -1:].expand(size, -1, -1)
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


def _with_own_prompts(rollouts: RolloutBatch, samples: list[int], device: torch.device) -> MicroBatch:
    completions = [rollouts.completion_ids[i] for i in samples]
    prompts = [_prompt(rollouts, i) for i in samples]
    rows = [[*p, *c[:-1]] for p, c in zip(prompts, completions, strict=True)]
    return _padded(samples, None, rows, [len(p) - 1 for p in prompts], completions, device)


def _with_shared_prompt(
    rollouts: RolloutBatch, samples: list[int], prompt: list[int], device: torch.device
) -> MicroBatch:
    completions = [rollouts.completion_ids[i] for i in samples]
    shared = torch.tensor([prompt], device=device)
    return _padded(samples, shared, [c[:-1] for c in completions], [0] * len(samples), completions, device)


def _padded(
    samples: list[int],
    shared_prompt: Tensor | None,
    rows: list[list[int]],
    first: list[int],
    completions: list[list[int]],
    device: torch.device,
) -> MicroBatch:
    """Pads `rows`; `first` holds the position that predicts each row's first completion token."""
    width = max(map(len, rows))
    return MicroBatch(
        samples=samples,
        shared_prompt=shared_prompt,
        input_ids=torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long, device=device),
        rows=torch.tensor([r for r, c in enumerate(completions) for _ in c], device=device),
        columns=torch.tensor(
            [f + k for f, c in zip(first, completions, strict=True) for k in range(len(c))], device=device
        ),
        targets=torch.tensor([token for c in completions for token in c], device=device),
    )


def batches_by_length(
    lengths: Sequence[int], budget: int, device: torch.device, rows: int = 1, pass_tokens: int = 0
) -> list[list[int]]:
    """Groups rows of similar length so that the passes of a model over the padded groups take the least time.

    A pass takes as long as its tokens, padding included, and some tokens more, for its kernel launches and, under FSDP,
    its all-gathers. So a short row joins a long one only where its padding costs less than a pass of its own. Among
    sorted rows the best groups are runs, and dynamic programming finds them.

    Args:
        lengths: Length of each row in tokens.
        budget: Maximum number of tokens in a group, padding included; a row longer than it forms a group of its own.
        device: Device of the model, which decides how much a pass costs.
        rows: Number of rows that each length stands for; they stay together, padded to that length.
        pass_tokens: Tokens that each pass processes besides the rows, such as a shared prompt.

    Returns:
        Groups of row indices; each row is in exactly one group. The groups with the most tokens come first, so that a
        budget that exceeds the memory fails at once.
    """
    overhead = pass_tokens + _PASS_TOKENS.get(device.type, _PASS_TOKENS["cuda"])
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = len(order)
    least = [0] * (count + 1)  # cost of the rows from the i-th longest one on
    end = [0] * count  # where the group that starts with it ends
    for start in reversed(range(count)):
        longest = lengths[order[start]] * rows
        most = min(count, start + max(1, budget // max(1, longest)))
        costs = [longest * (stop - start) + least[stop] for stop in range(start + 1, most + 1)]
        least[start] = min(costs) + overhead
        end[start] = start + 1 + costs.index(min(costs))
    groups, start = [], 0
    while start < count:
        groups.append(order[start : end[start]])
        start = end[start]
    return sorted(groups, key=lambda group: -lengths[group[0]] * len(group))
