"""What the processes of a run tell each other; with one process each of these is the plain thing.

Every rank has to call them together. Numbers travel as objects, which works for every backend and device; gradients,
which are large, travel as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rlmt.errors import SharedError, UserError

P = ParamSpec("P")
T = TypeVar("T")


def size() -> int:
    """Number of ranks."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this one, from 0."""
    return distributed.get_rank() if size() > 1 else 0


@dataclass
class _Failed:
    """What a rank has to tell in place of what it was asked for: it failed."""

    words: str
    mistake: bool
    """Whether it is one of the user's."""


class RankFailed(RuntimeError):
    """Another rank failed; raised by all that were to exchange something with it."""


def everyones(value: T) -> list[T]:
    """What each rank has, in the order of ranks; tensors come on the CPU, so give them on it.

    Args:
        value: this rank's; tensors and plain data.

    Raises:
        SharedError: another rank failed, in `together`, for a mistake of the user's.
        RankFailed: another rank failed in it for another reason.
    """
    if size() == 1:
        return [value]
    values = [value] * size()
    distributed.all_gather_object(values, value)
    failures = {number: each for number, each in enumerate(values) if isinstance(each, _Failed)}
    for number, failure in failures.items():
        if not failure.mistake:
            raise RankFailed(f"rank {number} failed: {failure.words}")
    for failure in failures.values():
        raise SharedError(failure.words, told=rank() > 0)
    return values


def together(work: Callable[[], T]) -> T:
    """Does something on each rank; where it fails on one, it fails on all, so that none waits for another in vain.

    One that fails tells the others at their next exchange, whichever that is: at the end of this, or within the work.

    Args:
        work: this rank's. Ranks wait for each other once it is done, and whether or not it failed.

    Returns:
        What it gave this rank.

    Raises:
        SharedError: it failed for a mistake of the user's; with the words of the first rank that it failed on.
        RankFailed: it failed on a rank for another reason; on that one it has the reason as its cause.
    """
    if size() == 1:
        return work()
    try:
        result = work()
    except (SharedError, RankFailed):
        raise  # all know
    except Exception as error:
        mistake = isinstance(error, UserError)
        try:
            everyones(_Failed(str(error) if mistake else f"{type(error).__name__}: {error}", mistake))
        except (SharedError, RankFailed) as told:
            raise told from error
    else:
        everyones(None)
    return result


def hook(method: Callable[P, T]) -> Callable[P, T]:
    """Makes what Lightning calls on all ranks fail on all where it fails on one, with one message (see `together`)."""

    @functools.wraps(method)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        return together(lambda: method(*args, **kwargs))

    return called


def mistake(message: str) -> UserError:
    """One of the user's that all ranks find at the same point; the first tells of it."""
    return UserError(message) if size() == 1 else SharedError(message, told=rank() > 0)


def gathered(values: Tensor) -> Tensor:
    """The elements of all ranks, end to end.

    Args:
        values: [n] this rank's; n may differ from rank to rank, and be 0.

    Returns:
        [sum of n], where `values` are.
    """
    return values if size() == 1 else torch.cat(everyones(values.detach().cpu())).to(values.device)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Puts the sum over ranks in the place of each gradient; one that is on no rank stays absent.

    Sharded parameters are left alone: their gradients are summed when they are scattered.

    Args:
        parameters: the same on each rank, in the same order.
    """
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    if size() == 1 or not whole:
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
