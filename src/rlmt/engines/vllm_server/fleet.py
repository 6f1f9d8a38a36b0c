"""Requests shared out among servers by how many each has outstanding."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from rlmt.engines.vllm_server.client import ServerClient, ServerLost

T = TypeVar("T")


class NoServerLeft(Exception):
    """All servers are lost."""


class Fleet:
    """The servers that can be used, and how busy each is.

    A request goes to the server with the fewest outstanding; those of one group go where its first one went as long as
    there is room, since they share a prompt, which the server computes once.

    Args:
        servers: those that can be used.
        limit: most requests outstanding at a server; the others wait for whichever is ready first.
    """

    def __init__(self, servers: Sequence[ServerClient], limit: int) -> None:
        self.living = list(servers)
        """The servers that are not lost."""
        self._limit = limit
        self._outstanding: Counter[ServerClient] = Counter()
        self._home: dict[int, ServerClient] = {}
        self._room = asyncio.Condition()

    async def run(self, group: int, request: Callable[[ServerClient], Awaitable[T]]) -> tuple[ServerClient, T]:
        """Makes a request of a server; if that is lost, of another.

        Args:
            group: requests of one number had better go to one server.
            request: makes it; where it raises `Unusable` the server gets no more requests.

        Returns:
            The server that answered, and its answer.

        Raises:
            NoneLeft: no server is left.
        """
        while True:
            server = await self._take(group)
            try:
                return server, await request(server)
            except ServerLost:
                async with self._room:
                    if server in self.living:
                        self.living.remove(server)
                    self._room.notify_all()
            finally:
                async with self._room:
                    self._outstanding[server] -= 1
                    self._room.notify()

    async def _take(self, group: int) -> ServerClient:
        async with self._room:
            await self._room.wait_for(lambda: self._free() or not self.living)
            free = self._free()
            if not free:
                raise NoServerLeft
            server = self._home.get(group)
            if server not in free:
                server = self._home[group] = min(free, key=lambda server: self._outstanding[server])
            self._outstanding[server] += 1
            return server

    def _free(self) -> list[ServerClient]:
        return [server for server in self.living if self._outstanding[server] < self._limit]


async def open_connections(servers: Sequence[ServerClient], do: Callable[[], Awaitable[T]]) -> T:
    """Does something while connected to servers."""
    async with AsyncExitStack() as connections:
        for server in servers:
            await connections.enter_async_context(server.connected())
        return await do()


async def gather_all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all; the first exception ends them all, so that none goes on without its connection."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
