"""Sends calls from a thread, so that requests are under way while the caller computes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from rlmt.endpoints.calls import Call
from rlmt.endpoints.client import EndpointClient
from rlmt.endpoints.endpoint import Endpoint
from rlmt.endpoints.ledger import Ledger
from rlmt.endpoints.meter import Meter


class BackgroundClient:
    """An `EndpointClient` on a thread of its own, which starts with the first batch.

    Args:
        endpoint: Endpoint.
        ledger: Where answers are kept; None keeps none. Used by the thread alone until `close`.
        fix: What the user can do when the endpoint is lost; the end of the message.
    """

    def __init__(self, endpoint: Endpoint, ledger: Ledger | None, fix: str) -> None:
        self._client = EndpointClient(endpoint, ledger, fix)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def meter(self) -> Meter:
        """Counts of requests, tokens and cost."""
        return self._client.meter

    def submit(self, calls: Sequence[Call]) -> Future[list[dict[str, Any]]]:
        """Starts sending calls.

        Args:
            calls: The calls.

        Returns:
            Future of the answers in the order of the calls. Its error is the first one of any call (`RequestRejected`
            or `EndpointError`), raised after the other outstanding calls have ended and their answers are recorded.
        """
        if self._loop is None:
            self._start()
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(self._post_all(list(calls)), self._loop)

    async def _post_all(self, calls: list[Call]) -> list[dict[str, Any]]:
        results = await asyncio.gather(*map(self._client.post, calls), return_exceptions=True)
        answers = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            answers.append(result)
        return answers

    def _start(self) -> None:
        """Starts the thread and opens connections."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rlmt-endpoint", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._client.__aenter__(), self._loop).result()

    def close(self) -> None:
        """Waits for outstanding attempts, then closes connections and ends the thread."""
        if self._loop is None:
            return
        loop, self._loop = self._loop, None
        with suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(self._client.__aexit__(None, None, None), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()
