"""The samples of one rollout, each completed by a server that holds the published weights before and after it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from rlmt import progress
from rlmt.distributed import collectives
from rlmt.engines.vllm_server.client import Completion, ServerClient
from rlmt.engines.vllm_server.connection import ServerLost
from rlmt.engines.vllm_server.fleet import Fleet, NoServerLeft, gather_or_cancel
from rlmt.engines.vllm_server.servers import Servers
from rlmt.types import Sampling


@dataclass(frozen=True, eq=False)
class Call:
    """One requested sample."""

    group: int
    prompt_ids: list[int]
    seed: int
    room: int
    """Number of tokens that fit after the prompt."""


class Generation:
    """Generates one batch of samples.

    Args:
        servers: The servers.
        usable: Returns the servers that hold the published weights.
        max_in_flight: Maximum number of outstanding samples per server, over all ranks.
    """

    def __init__(
        self, servers: Servers, usable: Callable[[], Awaitable[list[ServerClient]]], max_in_flight: int
    ) -> None:
        self._servers, self._usable = servers, usable
        self._limit = max(1, max_in_flight // collectives.world_size())
        self._cancel: Callable[[], object] | None = None
        self._answered = 0

    def run(self, calls: Sequence[Call], sampling: Sampling) -> list[Completion]:
        """Completes every call.

        Raises:
            UserError: No server is usable.
            RuntimeError: A server rejected a request.
        """
        return self._servers.run(lambda: self._complete_all(calls, sampling))

    def cancel(self) -> None:
        """Cancels `run` in another thread; harmless when it has ended."""
        if (cancel := self._cancel) is not None:
            with suppress(RuntimeError):  # its event loop has ended meanwhile
                cancel()

    async def _complete_all(self, calls: Sequence[Call], sampling: Sampling) -> list[Completion]:
        """Completes every call on a server that holds the published weights both before and after it."""
        task = asyncio.current_task()
        assert task is not None
        self._cancel = partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel)
        done: dict[Call, Completion] = {}
        try:
            while todo := [call for call in calls if call not in done]:
                fleet = Fleet(await self._usable(), self._limit)
                self._answered = 0
                answers = await gather_or_cancel(
                    fleet.run(call.group, partial(self._complete, call, sampling, len(todo))) for call in todo
                )
                stale = await self._servers.stale(fleet.usable)
                done |= {
                    call: answer for call, (server, answer) in zip(todo, answers, strict=True) if server not in stale
                }
        except NoServerLeft:
            raise self._servers.none_left() from None
        finally:
            self._cancel = None
        return [done[call] for call in calls]

    async def _complete(self, call: Call, sampling: Sampling, calls: int, server: ServerClient) -> Completion:
        """Completes one of some calls on a server, and marks the server as lost if it fails."""
        try:
            completion = await server.complete(call.prompt_ids, call.seed, call.room, sampling)
            self._answered += 1
            progress.report("sampling", self._answered, calls)
            return completion
        except ServerLost as error:
            self._servers.mark_lost(server, error)
            raise
