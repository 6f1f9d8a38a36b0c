"""Micro-batches of rollouts: which tokens go through the policy together, and how.

Samples of one prompt share its forward and backward: the prompt goes through the policy once, and its keys and values
are handed to all its samples. With 8 samples to a prompt that leaves an eighth of the work on prompts, and the gradient
is the same. Where layers are checkpointed, keys and values cannot be handed on, and every sample carries its prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlmt.distributed.fsdp2 import is_sharded
from rlmt.types import RolloutBatch


@dataclass
class MicroBatch:
    """Some samples, padded on the right to one length, and where their completion tokens are predicted."""

    samples: list[int]
    """b numbers of the samples in the rollout batch; none in one that keeps step, whose token counts nothing."""
    shared_prompt: Tensor | None
    """[1, n] int64 prompt of all these samples, or None: each row of `input_ids` begins with its own."""
    input_ids: Tensor
    """[b, L] int64: (prompt and) completion but its last token, padded on the right; L may be 0."""
    rows: Tensor
    """[t] int64 row of each completion token."""
    columns: Tensor
    """[t] int64 position in the row's hidden states that predicts it; a shared prompt's last position is position 0."""
    targets: Tensor
    """[t] int64 the completion tokens, samples end to end."""


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether the model can hand a prompt's keys and values to several samples, with gradients if they are on."""
    return not (model.is_gradient_checkpointing and model.training) and not is_sharded(model)


def no_op_micro_batch(device: torch.device) -> MicroBatch:
    """One without samples, for a rank to compute while another one has more of them (`sharding.in_step`)."""
    zero = torch.zeros(1, dtype=torch.long, device=device)
    return MicroBatch([], None, zero[None], zero, zero, zero)


def micro_batches(
    rollouts: RolloutBatch,
    samples: Sequence[int],
    budget: int,
    share_prompts: bool,
    device: torch.device,
    together: int = 1,
) -> Iterator[MicroBatch]:
    """Cuts samples into micro-batches of at most `budget` tokens, padding included; one unit may exceed it.

    Args:
        rollouts: where the samples are.
        samples: numbers of the samples to take, units one after the other.
        budget: tokens a micro-batch, prompts and padding included.
        share_prompts: whether samples of one prompt go together and share it.
        device: where the tensors go.
        together: samples of one prompt that make up a unit, which is never cut: 2 for pairs.
    """
    units = [samples[k : k + together] for k in range(0, len(samples), together)]
    if not (share_prompts and rollouts.group_size > 1):
        lengths = [
            len(_prompt(rollouts, unit[0])) + max(len(rollouts.completion_ids[i]) for i in unit) - 1 for unit in units
        ]
        for plan in batches_by_length(lengths, budget, together):
            yield _with_own_prompts(rollouts, [i for k in plan for i in units[k]], device)
        return
    groups: dict[int, list[Sequence[int]]] = {}
    for unit in units:
        groups.setdefault(unit[0] // rollouts.group_size, []).append(unit)
    for group in groups.values():
        prompt = _prompt(rollouts, group[0][0])
        lengths = [max(len(rollouts.completion_ids[i]) for i in unit) for unit in group]
        for part in batches_by_length(lengths, max(1, budget - len(prompt)), together):
            yield _with_shared_prompt(rollouts, [i for k in part for i in group[k]], prompt, device)


def hidden_states(decoder: Any, batch: MicroBatch) -> Tensor:
    """Last hidden states that predict the completion tokens: [t, H].

    Args:
        decoder: the model without its output projection.
        batch: b samples with t completion tokens.
    """
    # Causal attention never looks right, so the padding there needs no mask.
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
    """Pads `rows`; `first` is where the hidden state that predicts each row's first completion token lies."""
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


def batches_by_length(lengths: Sequence[int], budget: int, rows: int = 1) -> list[list[int]]:
    """Groups rows of like length so that each group, padded to its longest, holds at most `budget` tokens.

    Longest first, so that a budget too large for the memory shows at once. A row longer than the budget goes alone.

    Args:
        lengths: tokens of each row.
        budget: tokens a group, padding included.
        rows: rows that each length stands for: they stay together, padded to that length.

    Returns:
        Lists of row numbers; each row is in exactly one.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for i in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) * rows <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
