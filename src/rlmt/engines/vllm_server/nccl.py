"""Weights sync to servers over NCCL, through vLLM's own weight transfer.

Rank 0 of the trainer and the workers of all servers form a group, in which rank 0 broadcasts the weights, packed into
buffers; vLLM's classes do so on both sides. The unique id of the group travels over HTTP, so no store of pickled
objects is open to the network, and NCCL chooses the trainer's address and port (`NCCL_SOCKET_IFNAME`).

A group cannot lose a member. If a server was lost or has restarted since the last transfer, the next one opens a new
group with those that are usable. If one is lost during a transfer, the others wait for it and answer no more: the run
stops.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import os
import threading
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from rlmt.endpoints.connections import describe
from rlmt.engines.vllm.isolation import preserve_process_state
from rlmt.engines.vllm_server.client import ServerClient
from rlmt.engines.vllm_server.connection import TIMEOUT, ServerLost
from rlmt.engines.vllm_server.fleet import gather_or_cancel
from rlmt.engines.vllm_server.servers import Servers
from rlmt.engines.vllm_server.weight_transfer import PublishedWeights, WeightTransfer
from rlmt.errors import UserError
from rlmt.types import AdapterWeights

T = TypeVar("T")

BUFFER_BYTES = 256 * 2**20
"""Bytes of weights per broadcast; a larger tensor has a buffer of its own. Rank 0 holds two buffers and the tensors in
them, a server two buffers."""


def check_installation() -> None:
    """Checks that this process can send weights over NCCL.

    Raises:
        UserError: vLLM is not installed, or there is no GPU.
    """
    if importlib.util.find_spec("vllm") is None:
        missing, fix = "vLLM beside the trainer, too, which is not installed", "pip install vllm"
    elif not torch.cuda.is_available():
        missing, fix = "an NVIDIA GPU beside the trainer, and there is none", "train on one"
    else:
        return
    option = "--data.engine.weight_transfer"
    raise UserError(f"{option} nccl needs {missing}: {fix}, or use {option} folder.")


class NCCLTransfer(WeightTransfer):
    """Sends the policy's weights to all usable servers at each sync.

    Args:
        servers: The servers.
        shapes: Name and shape of each tensor that `publish` receives, in their order.
        dtype: Dtype in which weights are sent.
    """

    def __init__(self, servers: Servers, shapes: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> None:
        super().__init__()
        self._servers = servers
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        with preserve_process_state():
            from vllm.distributed.weight_transfer import ParamMeta

        self._source = _Source([ParamMeta(name, dtype, shape) for name, shape in shapes], dtype)
        self._group: _Group | None = None

    def publish(
        self, weights: Iterable[tuple[str, Tensor]] | None, version: int, adapter: AdapterWeights | None = None
    ) -> PublishedWeights:
        """Broadcasts the weights to all usable servers.

        Args:
            weights: Names and tensors of a checkpoint, all in one pass.
            version: Version of the policy.
            adapter: Always None: adapters are merged.

        Raises:
            UserError: No server is usable, or one was lost during the transfer.
        """
        assert weights is not None and adapter is None
        published = PublishedWeights(self.run, version)
        try:
            if self._group is None or not self._servers.run(partial(self._is_complete, self._group, published)):
                self.close()
                members = self._servers.run(partial(self._outside_groups, published))
                self._group = _Group(self._servers, members, self._source)
                self._group.join()
            self._source.weights = weights
            self._group.send(published)
        except _TransferFailed as error:
            self.close()
            raise UserError(
                f"--data.engine.weight_transfer nccl: {error}; a group cannot lose a member: restart all vLLM servers "
                "and resume with --ckpt_path last."
            ) from error
        except BaseException:
            self.close()
            raise
        finally:
            self._source.weights = ()
        return published

    async def _is_complete(self, group: _Group, published: PublishedWeights) -> bool:
        """Whether all usable servers are members of the group since its last transfer, and no others."""
        members: set[ServerClient] = set()

        async def check(server: ServerClient) -> None:
            if await server.check_member(published.prefix):
                members.add(server)

        usable = await self._servers.usable(check)
        return set(usable) == members == set(group.members)

    async def _outside_groups(self, published: PublishedWeights) -> dict[ServerClient, int]:
        """The usable servers, which leave their last group, and the number of workers of each."""
        workers: dict[ServerClient, int] = {}

        async def check(server: ServerClient) -> None:
            await server.check_member(published.prefix)
            await server.leave_group()
            workers[server] = await server.worker_count()

        await self._servers.usable(check)
        return workers

    def close(self) -> None:
        """Leaves the group, aborting a transfer; the servers leave it when they join the next one."""
        if self._group is not None:
            self._group.abort()
        self._group = None


class _Source:
    """The policy's weights, as a `WeightSource` of vLLM's.

    Args:
        metadata: Name, dtype and shape of each tensor, in vLLM's class.
        dtype: Dtype in which weights are sent.
    """

    def __init__(self, metadata: list[Any], dtype: torch.dtype) -> None:
        self.weights: Iterable[tuple[str, Tensor]] = ()
        """The weights of the next pass."""
        self.failed = False
        """Whether the last pass raised an exception of its own."""
        self._metadata, self._dtype = metadata, dtype

    def metadata(self) -> list[Any]:
        """What iteration yields."""
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self.failed = True
        for name, tensor in self.weights:
            self.failed = False
            yield name, tensor.detach().to(device, self._dtype)
            self.failed = True
        self.failed = False


class _TransferFailed(Exception):
    """A server, or NCCL itself, failed while a group was opened or weights were sent."""


class _Group:
    """Rank 0 and the workers of some servers, which vLLM's trainer engine drives through this class.

    Methods of vLLM's protocol `VLLMWeightSyncClient` have its names.

    Args:
        servers: All servers of the run.
        workers: The servers that become members, and the number of workers of each.
        source: Source of the weights.
    """

    def __init__(self, servers: Servers, workers: dict[ServerClient, int], source: _Source) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

        self.members = list(workers)
        """The servers in the group."""
        self._servers, self._workers = servers, workers
        self._published: PublishedWeights | None = None
        self._failure: BaseException | None = None
        self._received = threading.Event()
        self._aborted = False
        self._cancel: Callable[[], object] | None = None
        self._source = source
        self._communicator: Any = None
        self._engine: Any = NCCLTrainerWeightTransferEngine(
            client=cast(Any, self), source=cast(Any, source), packed_buffer_size_bytes=BUFFER_BYTES
        )

    def join(self) -> None:
        """Lets all members join.

        Raises:
            _TransferFailed: One could not.
        """
        with self._transfer_failures():
            self._communicator = self._engine.model_update_group = self._servers.run(self._join)

    async def _join(self) -> Any:
        """Joins as rank 0 while the servers join; returns vLLM's communicator."""
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
        from vllm.distributed.weight_transfer import nccl_common

        world_size = 1 + sum(self._workers.values())
        unique_id = bytes(NCCLLibrary().ncclGetUniqueId().internal)
        info = partial(
            nccl_common.NCCLWeightTransferInitInfo,
            nccl_unique_id_b64=base64.b64encode(unique_id).decode(),
            world_size=world_size,
            packed=self._engine.packed,
            packed_buffer_size_bytes=self._engine.packed_buffer_size_bytes,
            packed_num_buffers=self._engine.packed_num_buffers,
        )
        device = torch.accelerator.current_device_index()
        # In a thread that may wait forever: NCCL cannot be interrupted while a server that failed does not join.
        join = partial(nccl_common.uid_init_process_group, unique_id, 0, world_size, device)
        communicator = _in_daemon_thread(join)
        offset_of = dict(zip(self.members, accumulate(self._workers.values(), initial=1), strict=False))

        async def join_as_server(server: ServerClient) -> None:
            await server.join_group(nccl_common.worker_init_payload(info(rank_offset=offset_of[server])))

        await gather_or_cancel([_wait(communicator), self._gather(join_as_server)])
        return communicator.result()

    def send(self, published: PublishedWeights) -> None:
        """Sends the weights of the source to all members, which sample with them from then on.

        Args:
            published: Version of the weights.

        Raises:
            _TransferFailed: A member was lost, or NCCL failed.
        """
        self._published = published
        self._received.clear()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # vLLM reads the weights on streams of its own
        with self._transfer_failures(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Tensor .* exceeds buffer_size_bytes"
            )  # it has a buffer of its own
            self._engine.send_weights()

    @contextmanager
    def _transfer_failures(self) -> Iterator[None]:
        """Raises errors of NCCL as `_TransferFailed`, with the reason of a lost server where there is one."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self._source.failed:
                raise
            if self._published is not None:
                self._received.wait(TIMEOUT)  # until the requests to the servers have ended, too
            raise _TransferFailed(self._failure or f"NCCL failed ({describe(error)})") from error

    def start_weight_update(self) -> None:
        """Prepares all members for new weights."""
        self._call_all(ServerClient.start_update)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Lets all members receive and load weights; vLLM calls it in a thread while it broadcasts them."""
        try:
            self._call_all(lambda server: server.receive_weights(update_info))
        except BaseException as error:
            self._failure = error
            self.abort()  # the broadcast would wait for the lost member
            raise
        finally:
            self._received.set()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Lets all members sample with the weights, under the label of this run."""
        published = self._published
        assert published is not None
        self._call_all(lambda server: server.finish_update(published))

    def _call_all(self, call: Callable[[ServerClient], Awaitable[None]]) -> None:
        """Calls all members concurrently."""

        async def work() -> None:
            task = asyncio.current_task()
            assert task is not None
            self._cancel = partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel)
            if not self._aborted:
                await self._gather(call)

        self._servers.run(work)

    async def _gather(self, call: Callable[[ServerClient], Awaitable[None]]) -> None:
        """Awaits a call of each member."""

        async def call_one(server: ServerClient) -> None:
            try:
                await call(server)
            except ServerLost as error:
                raise _TransferFailed(f"vLLM server {server.url} {error}") from error

        await gather_or_cancel(map(call_one, self.members))

    def abort(self) -> None:
        """Aborts a transfer in any thread, and leaves the group; harmless when called twice."""
        self._aborted = True
        if (cancel := self._cancel) is not None:
            with suppress(RuntimeError):  # its event loop has ended meanwhile
                cancel()
        if self._communicator is not None:
            self._communicator.destroy()  # the engine keeps it: another thread may be about to broadcast


def _in_daemon_thread(work: Callable[[], T]) -> Future[T]:
    """Runs a function in a thread that does not keep the process alive."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


async def _wait(future: Future[Any]) -> None:
    """Waits for a future of a thread."""
    await asyncio.wrap_future(future)
