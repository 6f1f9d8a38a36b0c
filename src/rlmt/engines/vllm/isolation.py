"""Isolation of vLLM within the trainer's process.

vLLM changes process-wide state, which is restored here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import distributed

from rlmt.distributed import collectives


@contextmanager
def preserve_process_state() -> Iterator[None]:
    """Restores the process state that vLLM changes: random states, default dtype, threads and the exception hook."""
    dtype, threads, hook = torch.get_default_dtype(), torch.get_num_threads(), sys.excepthook
    set_num_threads = torch.set_num_threads
    try:
        with isolate_rng():  # vLLM seeds Python, NumPy and torch
            yield
    finally:
        # vLLM's CPU worker replaces set_num_threads by a warning, since it binds the threads of its worker processes.
        # In this process it binds none.
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        sys.excepthook = hook  # torch.distributed's hook prefixes every line of a traceback with the rank


@contextmanager
def single_thread(enabled: bool) -> Iterator[None]:
    """Runs torch on one thread, as vLLM does while it generates on a GPU, and restores the trainer's threads.

    With more threads vLLM's short CPU operations leave OpenMP's workers spinning beside its scheduler. Like vLLM it
    leaves the number alone where the user has set OMP_NUM_THREADS.

    Args:
        enabled: Whether to do so; otherwise the context is a no-op.
    """
    if not enabled or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def unbound_process_group() -> Iterator[None]:
    """Clears the device that Lightning binds to the default process group, and restores it.

    With a bound device torch creates subgroups by splitting the group's NCCL communicator, gloo groups included: ranks
    outside of a new group then call ncclCommSplit, in which its members take no part, and hang or fail
    (github.com/pytorch/pytorch/issues/145376). vLLM creates such groups when it starts.
    """
    if not distributed.is_initialized():
        yield
        return
    group: Any = distributed.group.WORLD
    device, group.bound_device_id = group.bound_device_id, None
    try:
        yield
    finally:
        group.bound_device_id = device


@contextmanager
def rank_environment() -> Iterator[None]:
    """Sets the environment variables from which vLLM reads this process's rank; a no-op in a single process."""
    if collectives.world_size() == 1:
        yield
        return
    rank = str(collectives.rank())
    # vLLM uses LOCAL_RANK as the GPU index, which can differ from the rank (--trainer.devices "[2,3]").
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        local = str(torch.cuda.current_device())
    else:
        local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or rank
    # On a CPU vLLM would bind the threads of all ranks to the same cores.
    variables = {"RANK": rank, "LOCAL_RANK": local, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with mock.patch.dict(os.environ, variables):
        yield


@contextmanager
def keep_process_group() -> Iterator[None]:
    """Keeps the trainer's default process group alive while vLLM shuts down, which would destroy it."""
    destroy = distributed.destroy_process_group

    def destroy_others(group: Any = None) -> None:
        if group is not None:
            destroy(group)

    with mock.patch.object(distributed, "destroy_process_group", destroy_others):
        yield
