"""Rows of tokens as a decoder reads them: padded to one length, or packed into one long row without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmt.annotations import PreTrainedModel
from rlmt.models.varlen import VARLEN

_PASS_TOKENS = {"cpu": 128, "cuda": 1024}
"""Number of tokens that a model processes in about the fixed time of a forward and backward pass."""


@dataclass(frozen=True)
class Packing:
    """Where rows begin that are packed into one of T tokens."""

    position_ids: Tensor
    """[1, T] int64, from 0 in each row."""
    boundaries: Tensor
    """[b + 1] int32: the first token of each row, and T."""
    lengths: list[int]
    """Tokens of each row."""


def packs_rows(model: PreTrainedModel) -> bool:
    """True if the model's attention takes packed rows."""
    return bool(model.config._attn_implementation == VARLEN)


def stack_rows(rows: Sequence[Tensor], packed: bool, device: torch.device) -> tuple[Tensor, Packing | None]:
    """Makes one tensor of rows.

    Args:
        rows: b rows of token ids, each [n] of integers on the CPU; n differs between rows.
        packed: Whether to pack the rows; otherwise they are padded on the right to one length.
        device: Device of the tensors.

    Returns:
        [1, T] int64 and how it is packed, or [b, L] int64 and None.
    """
    lengths = [len(row) for row in rows]
    if not packed:
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        return ids.to(device), None
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    boundaries = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
    return torch.cat([row.long() for row in rows])[None].to(device), Packing(positions, boundaries, lengths)


def row_states(decoder: Any, ids: Tensor, packing: Packing | None, rows: Tensor, columns: Tensor) -> Tensor:
    """Computes the last hidden states at some tokens of rows from `stack_rows`.

    Args:
        decoder: The model without its head.
        ids: [1, T] or [b, L] int64.
        packing: How the rows are packed, if they are.
        rows: [t] int64 row of each token.
        columns: [t] int64 position of each token in its row.

    Returns:
        [t, H] in the decoder's dtype.
    """
    if packing is None:  # padding on the right needs no mask: causal attention does not look right
        padded: Tensor = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return padded[rows, columns]
    hidden: Tensor = decoder(
        input_ids=ids,
        position_ids=packing.position_ids,
        use_cache=False,
        row_boundaries=packing.boundaries,
        row_lengths=packing.lengths,
    ).last_hidden_state
    return hidden[0, packing.boundaries[rows] + columns]


def group_rows(
    units: Sequence[Sequence[int]], budget: int, packed: bool, device: torch.device, pass_tokens: int = 0
) -> list[list[int]]:
    """Groups rows so that the passes of a model over the groups take the least time.

    Args:
        units: The lengths of rows that stay together, in tokens.
        budget: Maximum number of tokens in a group, padding included; a unit longer than it forms a group of its own.
        packed: Whether the rows of a group are packed; otherwise they are padded.
        device: Device of the model, which decides how much a pass costs.
        pass_tokens: Tokens that each pass processes besides the rows, such as a shared prompt.

    Returns:
        Groups of indices of units; each unit is in exactly one group. The groups with the most tokens come first, so
        that a budget that exceeds the memory fails at once.
    """
    if packed:
        return pack_by_length([sum(unit) for unit in units], budget)
    most = max(map(len, units), default=1)
    return batches_by_length([max(unit) for unit in units], budget, device, most, pass_tokens)


def pack_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Packs rows into few groups: each one, the longest first, goes into the first group that has room for it.

    Args:
        lengths: Length of each row in tokens.
        budget: Maximum number of tokens in a group; a row longer than it forms a group of its own.

    Returns:
        As `group_rows`.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        group = next((k for k, left in enumerate(room) if left >= lengths[i]), len(groups))
        if group == len(groups):
            groups.append([])
            room.append(budget)
        groups[group].append(i)
        room[group] -= lengths[i]
    return [groups[k] for k in sorted(range(len(groups)), key=lambda k: room[k])]


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
