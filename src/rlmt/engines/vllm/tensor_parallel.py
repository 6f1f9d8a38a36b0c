"""One vLLM over several ranks (tensor parallelism): which ranks hold it together, and how they share their requests.

Each rank of such a group runs vLLM's whole loop, on the same requests in the same order; only what its GPU computes is
a part. So all of them have to be asked together, and all of them draw every sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import distributed
from transformers import PretrainedConfig

from rlmt.errors import UserError
from rlmt.types import SampleRequest

_OPTION = "--data.engine.tensor_parallel_size"


def check_ranks(size: int, ranks: int) -> None:
    """Raises UserError unless a run of `ranks` processes can be cut into groups of `size`."""
    if size > 1 and ranks == 1:
        raise UserError(
            f"{_OPTION} is {size}: it cuts vLLM over the processes of a run, and this run has one; set "
            f"--config ddp or fsdp with --trainer.devices {size}, or leave the option out"
        )
    if ranks % size:
        raise UserError(f"{_OPTION} is {size}: it has to divide the {ranks} processes of this run")


def check_heads(size: int, config: PretrainedConfig) -> None:
    """Raises UserError unless vLLM can share a policy's attention heads out evenly.

    Args:
        size: ranks that hold the policy together.
        config: the policy's.
    """
    if size == 1:
        return
    text: Any = config.get_text_config()
    heads = text.num_attention_heads
    if heads % size:
        raise UserError(f"{_OPTION} is {size}: it has to divide the policy's {heads} attention heads")
    pairs = getattr(text, "num_key_value_heads", None) or heads
    if pairs % size and size % pairs:
        raise UserError(
            f"{_OPTION} is {size}: it has to divide the policy's {pairs} key-value heads, or be a multiple of them"
        )


def requests_of_all(requests: Sequence[SampleRequest]) -> tuple[list[SampleRequest], slice]:
    """What all ranks of this one's engine are asked for; collective among them, once the engine runs.

    Args:
        requests: this rank's; may be none.

    Returns:
        The requests of all, in the order of ranks, and where this rank's samples are among theirs.
    """
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    each: list[list[SampleRequest]] = [[]] * group.world_size
    distributed.all_gather_object(each, list(requests), group=group.cpu_group)
    counts = [sum(len(request.seeds) for request in asked) for asked in each]
    start = sum(counts[: group.rank_in_group])
    return [request for asked in each for request in asked], slice(start, start + counts[group.rank_in_group])


@contextmanager
def over_gloo(wanted: bool) -> Iterator[None]:
    """Lets the ranks of vLLM's CPU build talk over gloo while it starts, if that is wanted.

    Its own way is memory that they share, under a name that, for ranks started by others, is the same in every run of
    a machine.
    """
    if not wanted:
        yield
        return
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    with mock.patch.object(CpuCommunicator, "_all_group_ranks_share_shm_group_name", lambda communicator: False):
        yield
