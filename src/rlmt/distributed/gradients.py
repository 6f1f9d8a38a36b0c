"""Gradients over ranks: summed once per optimizer step, then clipped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rlmt.distributed.collectives import world_size


def no_gradient_sync(strategy: Strategy) -> AbstractContextManager[None]:
    """Context for a backward pass that adds to this rank's gradient only; call `sum_gradients` once per step.

    Ranks then need not have the same number of backward passes.
    """
    context: AbstractContextManager[None] = (
        strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
    )
    return context


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Puts the sum over ranks in the place of each gradient; one that is on no rank stays absent.

    Sharded parameters are left alone: their gradients are summed when they are scattered.

    Args:
        parameters: the same on each rank, in the same order.
    """
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    if world_size() == 1 or not whole:
        return
    there = torch.tensor([p.grad is not None for p in whole], dtype=torch.int32, device=whole[0].device)
    distributed.all_reduce(there, distributed.ReduceOp.MAX)
    pending = []
    for parameter, wanted in zip(whole, there.tolist(), strict=True):
        if wanted:
            if parameter.grad is None:  # no sample of this rank took part
                parameter.grad = torch.zeros_like(parameter)
            pending.append(distributed.all_reduce(parameter.grad, async_op=True))
    for work in pending:
        work.wait()


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scales gradients, all whole or all sharded, to a norm of at most `max_norm`.

    Returns:
        The norm before, over all shards.
    """
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)
