"""Collective operations over ranks; no-ops in a single process.

Every rank must call them at the same point. Small values are sent as pickled objects, which works on every backend and
device; `rlmt.distributed.gradients` sends gradients as tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, distributed

from rlmt.errors import AllRanksUserError, UserError, own_error_message, user_error_text

P = ParamSpec("P")
T = TypeVar("T")


def world_size() -> int:
    """Number of ranks."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Index of this rank, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


@dataclass
class _Failure:
    """What a failed rank sends instead of its value."""

    message: str
    is_user_error: bool


class RankFailed(RuntimeError):
    """Another rank failed; raised by every rank at its next collective operation."""


def all_gather_object(value: T) -> list[T]:
    """Collects one object from every rank.

    Args:
        value: This rank's object: plain data, or tensors on the CPU.

    Returns:
        The objects of all ranks, ordered by rank.

    Raises:
        AllRanksUserError: Another rank failed with a `UserError` in `run_on_all_ranks`.
        RankFailed: Another rank failed there with any other exception.
    """
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    distributed.all_gather_object(values, value)
    failures = {number: each for number, each in enumerate(values) if isinstance(each, _Failure)}
    for number, failure in failures.items():
        if not failure.is_user_error:
            raise RankFailed(f"rank {number} failed: {failure.message}")
    for failure in failures.values():
        raise AllRanksUserError(failure.message, reported_elsewhere=rank() > 0)
    return values


def run_on_all_ranks(work: Callable[[], T]) -> T:
    """Runs a function on every rank; if it fails on one rank, it fails on all, so that no rank waits for another.

    The failed rank sends its error in place of its value in the next `all_gather_object`: the one at the end of this
    function, or one inside `work` on the other ranks.

    Args:
        work: This rank's function. All ranks synchronise after it, whether or not it failed.

    Returns:
        The result on this rank.

    Raises:
        AllRanksUserError: `work` raised a `UserError`; the message is that of the first rank that failed.
        RankFailed: `work` raised another exception on some rank; on that rank it is the cause of this one.
    """
    if world_size() == 1:
        return work()
    try:
        result = work()
    except (AllRanksUserError, RankFailed):
        raise  # every rank raises it already
    except Exception as error:
        message = user_error_text(error) if isinstance(error, UserError) else own_error_message(error)
        failure = _Failure(message or f"{type(error).__name__}: {error}", is_user_error=message is not None)
        try:
            all_gather_object(failure)
        except (AllRanksUserError, RankFailed) as shared:
            raise shared from error
    else:
        all_gather_object(None)
    return result


def rank_hook(method: Callable[P, T]) -> Callable[P, T]:
    """Decorates a Lightning hook so that an error on one rank is raised on all ranks (see `run_on_all_ranks`)."""

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        return run_on_all_ranks(lambda: method(*args, **kwargs))

    return wrapper


def user_error_on_all_ranks(message: str) -> UserError:
    """Creates a `UserError` for an error that every rank raises at the same point; only rank 0 prints it."""
    return UserError(message) if world_size() == 1 else AllRanksUserError(message, reported_elsewhere=rank() > 0)


def all_gather_tensor(values: Tensor) -> Tensor:
    """Concatenates a tensor over ranks.

    Args:
        values: [n] this rank's elements; n can differ between ranks and can be 0.

    Returns:
        [sum of n] on the device of `values`.
    """
    if world_size() == 1:
        return values
    return torch.cat(all_gather_object(values.detach().cpu())).to(values.device)
