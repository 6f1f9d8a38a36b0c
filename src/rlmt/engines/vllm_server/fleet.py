"""Load balancing: requests go to the servers by their number of outstanding requests."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from rlmt.engines.vllm_server.client import ServerClient
from rlmt.engines.vllm_server.connection import ServerLost

T = TypeVar("T")


class NoServerLeft(Exception):
    """All servers are lost."""


class Fleet:
    """The usable servers, and the number of outstanding requests of each.

    A request goes to the server with the fewest outstanding requests. Requests of a group go to the server of their
    first one as long as it has capacity: they share a prompt, so its prefix is computed only once.

    Args:
        servers: The usable servers.
        limit: Maximum number of outstanding requests per server; further requests wait for the first server with
            capacity.
    """

    def __init__(self, servers: Sequence[ServerClient], limit: int) -> None:
        self.usable = list(servers)
        """The servers that are not lost."""
        self._limit = limit
        self._outstanding: Counter[ServerClient] = Counter()
        self._server_of_group: dict[int, ServerClient] = {}
        self._changed = asyncio.Condition()

    async def run(self, group: int, request: Callable[[ServerClient], Awaitable[T]]) -> tuple[ServerClient, T]:
        """Sends a request to a server, and to another one if that server is lost.

        Args:
            group: Group of the request; requests of a group prefer the same server.
            request: Sends the request; if it raises `ServerLost`, the server receives no more requests.

        Returns:
            The server that answered, and its answer.

        Raises:
            NoServerLeft: All servers are lost.
        """
        while True:
            server = await self._acquire(group)
            try:
                return server, await request(server)
            except ServerLost:
                async with self._changed:
                    if server in self.usable:
                        self.usable.remove(server)
                    self._changed.notify_all()
            finally:
                async with self._changed:
                    self._outstanding[server] -= 1
                    self._changed.notify()

    async def _acquire(self, group: int) -> ServerClient:
        """Waits for a server with capacity and counts one more request there."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._with_capacity() or not self.usable)
            candidates = self._with_capacity()
            if not candidates:
                raise NoServerLeft
            server = self._server_of_group.get(group)
            if server not in candidates:
                server = min(candidates, key=lambda server: self._outstanding[server])
                self._server_of_group[group] = server
            self._outstanding[server] += 1
            return server

    def _with_capacity(self) -> list[ServerClient]:
        """Usable servers below the limit."""
        return [server for server in self.usable if self._outstanding[server] < self._limit]


async def run_connected(servers: Sequence[ServerClient], work: Callable[[], Awaitable[T]]) -> T:
    """Awaits `work()` while connections to the servers are open."""
    async with AsyncExitStack() as connections:
        for server in servers:
            await connections.enter_async_context(server.connect())
        return await work()


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Gathers all results; the first exception cancels the rest, so that none outlives its connection."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
