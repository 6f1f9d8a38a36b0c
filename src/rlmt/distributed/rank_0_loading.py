"""Reads models on rank 0 only, for models that are sharded before they are used.

Other ranks receive the modules with parameters on the meta device, and the weights one at a time while `shard_model`
shards them. So only rank 0 holds a whole model in host memory, and files are read once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from rlmt.distributed.collectives import all_gather_object, rank

T = TypeVar("T")

_active = False


@contextmanager
def rank_0_loads(active: bool = True) -> Iterator[None]:
    """Context in which `load_on_rank_0` loads on rank 0 only.

    Args:
        active: Whether it does; the context of a strategy that shards nothing has no effect.
    """
    global _active
    before, _active = _active, active
    try:
        yield
    finally:
        _active = before


def load_on_rank_0(load: Callable[[], T]) -> T:
    """Loads modules; inside `rank_0_loads` only on rank 0, as a collective operation that belongs in a `rank_hook`.

    The random state of torch on all ranks is then the one that rank 0 has after loading, as if they had loaded, too.

    Args:
        load: Returns a module or a tuple of modules that can be pickled; None in place of a module is allowed.

    Returns:
        The modules; on other ranks than 0 with parameters on the meta device, for `shard_model` to receive.
    """
    if not _active:
        return load()
    if rank() == 0:
        loaded = load()
        all_gather_object((_without_weights(loaded), torch.get_rng_state()))
        return loaded
    sent: tuple[T, Tensor] = cast(Any, all_gather_object(None)[0])
    torch.set_rng_state(sent[1])
    return sent[0]


def _without_weights(modules: T) -> T:
    """A copy with parameters on the meta device, tied where they are tied; buffers are copied, also those not saved."""
    listed = modules if isinstance(modules, tuple) else (modules,)
    parameters = [p for module in listed if isinstance(module, nn.Module) for p in module.parameters()]
    return copy.deepcopy(modules, {id(p): _on_meta(p) for p in parameters})


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)


def is_on_rank_0(module: nn.Module) -> bool:
    """True if other ranks lack the weights of a module from `load_on_rank_0`. A collective operation."""
    return any(all_gather_object(any(p.is_meta for p in module.parameters())))


@torch.no_grad()
def broadcast_weights(parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    """Replaces weights by those of rank 0, one at a time. A collective operation.

    Args:
        parameters: The same parameters on every rank; those of other ranks than 0 are on the meta device.
        device: Device of the process group, which then holds the weights.
    """
    for parameter in parameters:
        weight: Tensor = parameter.to(device) if rank() == 0 else torch.empty_like(parameter, device=device)
        weight = weight.contiguous()
        distributed.broadcast(weight, src=0)
        if rank() == 0:
            parameter.data = weight
        else:  # keeps the identity of the parameter, which tied layers share
            cast(Any, torch.utils).swap_tensors(parameter, nn.Parameter(weight, parameter.requires_grad))
