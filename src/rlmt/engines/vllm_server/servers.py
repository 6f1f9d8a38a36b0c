"""The servers of a run: checks of all of them at once, and which of them are lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rlmt.distributed import collectives
from rlmt.engines.vllm_server.client import ServerClient
from rlmt.engines.vllm_server.connection import ServerLost
from rlmt.engines.vllm_server.fleet import gather_or_cancel, run_connected
from rlmt.engines.vllm_server.weight_transfer import PublishedWeights
from rlmt.errors import UserError

T = TypeVar("T")


class Servers:
    """The servers of a run.

    Args:
        clients: One for each server; all ranks have the same order.
    """

    def __init__(self, clients: Sequence[ServerClient]) -> None:
        first = collectives.rank() % len(clients)  # ranks prefer different servers for their first requests
        self.clients = [*clients[first:], *clients[:first]]
        """One for each server, in the order of this rank's preference."""
        self._urls = [client.url for client in clients]
        self._lost: dict[str, str] = {}

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Awaits `work()` in an event loop of its own, in which all clients have connections."""
        return asyncio.run(run_connected(self.clients, work))

    def check(self, check: Callable[[ServerClient], Awaitable[None]]) -> None:
        """Checks all servers concurrently, on every rank; UserError for the first that fails."""

        async def check_one(server: ServerClient) -> None:
            try:
                await check(server)
            except ServerLost as error:
                raise UserError(f"vLLM server {server.url} {error}.") from error

        collectives.run_on_all_ranks(lambda: self.run(lambda: gather_or_cancel(map(check_one, self.clients))))

    async def usable(self, check: Callable[[ServerClient], Awaitable[None]]) -> list[ServerClient]:
        """Servers that pass a check; the others are marked as lost.

        Args:
            check: Raises ServerLost for a server that is not usable.

        Raises:
            UserError: No server is usable.
        """

        async def is_usable(server: ServerClient) -> bool:
            try:
                await check(server)
            except ServerLost as error:
                self.mark_lost(server, error)
                return False
            if self._lost.pop(server.url, None) is not None:
                rank_zero_info(f"vLLM server {server.url} is used again.")
            return True

        usable = await asyncio.gather(*map(is_usable, self.clients))
        if not any(usable):
            raise self.none_left()
        return [server for server, good in zip(self.clients, usable, strict=True) if good]

    async def any_lacks(self, published: PublishedWeights) -> bool:
        """Whether a healthy server does not hold the published weights; the others are marked as lost."""

        async def lacks(server: ServerClient) -> bool:
            try:
                return await server.lacks_weights(published)
            except ServerLost as error:
                self.mark_lost(server, error)
                return False

        return any(await asyncio.gather(*map(lacks, self.clients)))

    async def stale(self, servers: Sequence[ServerClient]) -> set[ServerClient]:
        """Those of some servers that did not hold the same weights all the time, since they were restarted."""
        stale = set()
        for server in servers:
            try:
                if not await server.has_same_weights():
                    stale.add(server)
            except ServerLost as error:
                self.mark_lost(server, error)
        return stale

    def mark_lost(self, server: ServerClient, error: ServerLost) -> None:
        """Stores why a server is not usable, and warns the first time."""
        if server.url not in self._lost:
            rank_zero_warn(f"vLLM server {server.url} is not used for now: it {error}.")
        self._lost[server.url] = str(error)

    def none_left(self) -> UserError:
        """The error when every server is lost, with all reasons."""
        reasons = "; ".join(f"{url} {self._lost[url]}" for url in self._urls if url in self._lost)
        return UserError(
            f"--data.engine.urls: no vLLM server is usable ({reasons}); start the servers and resume with "
            "--ckpt_path last."
        )
