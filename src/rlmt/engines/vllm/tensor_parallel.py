"""Tensor parallelism of the in-process vLLM over neighbouring ranks: checks, and the exchange of requests.

Each rank of a tensor-parallel group runs vLLM's whole scheduler loop on the same requests in the same order; only the
model computation is sharded. So all ranks of a group call vLLM together, and all of them sample every completion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import distributed

from rlmt.annotations import PretrainedConfig
from rlmt.errors import UserError
from rlmt.types import SampleRequest

_OPTION = "--data.engine.tensor_parallel_size"


def check_ranks(size: int, ranks: int) -> None:
    """Checks that the ranks of a run can form tensor-parallel groups.

    Args:
        size: Ranks per group.
        ranks: Ranks of the run.

    Raises:
        UserError: `size` does not divide `ranks`, or the run has a single process.
    """
    if size > 1 and ranks == 1:
        raise UserError(
            f"{_OPTION} is {size}, but this run has one process: set --config ddp or fsdp with --trainer.devices "
            f"{size}, or leave the option out."
        )
    if ranks % size:
        raise UserError(f"{_OPTION} is {size}: it must divide the {ranks} processes of this run.")


def check_heads(size: int, config: PretrainedConfig) -> None:
    """Checks that vLLM can divide the policy's attention heads evenly.

    Args:
        size: Ranks per tensor-parallel group.
        config: The policy's configuration.

    Raises:
        UserError: It cannot.
    """
    if size == 1:
        return
    text: Any = config.get_text_config()
    heads = text.num_attention_heads
    if heads % size:
        raise UserError(f"{_OPTION} is {size}: it must divide the policy's {heads} attention heads.")
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    if key_value_heads % size and size % key_value_heads:
        raise UserError(
            f"{_OPTION} is {size}: it must divide the policy's {key_value_heads} key-value heads, or be a multiple of "
            "their number."
        )


def gather_requests(requests: Sequence[SampleRequest]) -> tuple[list[SampleRequest], slice]:
    """Gathers the requests of all ranks of this rank's tensor-parallel group; collective within the running group.

    Args:
        requests: This rank's requests; may be empty.

    Returns:
        The requests of the group in the order of ranks, and the slice of its samples that belongs to this rank.
    """
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    gathered: list[list[SampleRequest]] = [[]] * group.world_size
    distributed.all_gather_object(gathered, list(requests), group=group.cpu_group)
    counts = [sum(len(request.seeds) for request in of_rank) for of_rank in gathered]
    start = sum(counts[: group.rank_in_group])
    return [request for of_rank in gathered for request in of_rank], slice(start, start + counts[group.rank_in_group])


@contextmanager
def gloo_communicator(enabled: bool) -> Iterator[None]:
    """Makes vLLM's CPU build communicate over gloo if it starts within this context.

    By default its ranks share memory under a name that, with the external launcher, is the same for every run on a
    machine.

    Args:
        enabled: Whether to do so; otherwise the context is a no-op.
    """
    if not enabled:
        yield
        return
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    with mock.patch.object(CpuCommunicator, "_all_group_ranks_share_shm_group_name", lambda communicator: False):
        yield
