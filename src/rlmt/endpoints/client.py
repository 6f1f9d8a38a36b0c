"""Sends calls to an endpoint: bounded concurrency, retries, answers kept in a ledger."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rlmt.endpoints.calls import Call, Usage
from rlmt.endpoints.connections import describe, one_line, open_client
from rlmt.endpoints.endpoint import Endpoint
from rlmt.endpoints.ledger import Ledger, redact
from rlmt.endpoints.meter import Meter
from rlmt.errors import UserError

if TYPE_CHECKING:
    from openai import APIStatusError

CONTINUE = "run the same command again: it continues where it stopped"
"""What a user does after an error stopped a command that keeps a ledger."""

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds before the second attempt of a call, which double with each further one, and their limit."""

_REFUSED = (400, 413, 422)
"""Statuses that refuse one body, for example because it is too long; others may be answered."""


class EndpointError(UserError):
    """The endpoint cannot be used, so that the run has to stop."""


class CostLimitReached(EndpointError):
    """Another call could exceed the cost limit."""


class RequestRejected(UserError):
    """The endpoint refuses this call; it may answer others."""


class _Failed(Exception):
    """A failed attempt that may be repeated, after `wait` seconds if the endpoint names them; the message is why."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class EndpointClient:
    """Sends calls to an endpoint, as an asynchronous context manager.

    An answer that is in the ledger is not requested again, and the same call is not sent twice at a time. The first
    `EndpointError` ends the client: outstanding attempts are still answered and recorded, and nothing else is sent. The
    same holds at the end of the context, also after an interruption.

    Args:
        endpoint: Endpoint.
        ledger: Where answers are kept; None keeps none.
        fix: What the user can do when the endpoint is lost; the end of the message.
        spent: Billed tokens outside the ledger that count towards the cost limit.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        ledger: Ledger | None,
        fix: str,
        spent: Usage = Usage(),  # noqa: B008 - immutable
    ) -> None:
        self.endpoint = endpoint
        self.meter = Meter(endpoint, spent + (ledger.usage[endpoint.model] if ledger is not None else Usage()))
        self._ledger, self._fix = ledger, fix
        self._key = endpoint.key
        self._slots = asyncio.Semaphore(endpoint.max_in_flight)
        self._tasks: dict[str, asyncio.Task[dict[str, Any]]] = {}
        self._end: Exception | None = None
        self._ended = asyncio.Event()
        self._random = random.Random()  # the global generator belongs to the run

    async def __aenter__(self) -> EndpointClient:
        self._connections = AsyncExitStack()
        client = open_client(self.endpoint.base_url, self._key, self.endpoint.timeout)
        self._openai = await self._connections.enter_async_context(client)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop(EndpointError(f"{self.endpoint.base_url}: the client is closed; {self._fix}."))
        try:
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        finally:
            await self._connections.aclose()

    def _stop(self, error: Exception) -> None:
        """Ends the client; only the first error counts."""
        self._end = self._end or error
        self._ended.set()

    async def post(self, call: Call) -> dict[str, Any]:
        """Returns the answer to a call, from the ledger or from the endpoint.

        Args:
            call: The call.

        Returns:
            JSON of the answer.

        Raises:
            RequestRejected: The endpoint refuses the call.
            EndpointError: The endpoint failed in all attempts, rejects the API key or has no such path, or the call
                could exceed the cost limit.
            UserError: The ledger cannot be written.
        """
        if self._ledger is not None and (answer := self._ledger.get(call.key)) is not None:
            self.meter.reused += 1
            return answer
        if call.key not in self._tasks:
            task = asyncio.create_task(self._fetch(call))
            self._tasks[call.key] = task
            task.add_done_callback(lambda done: self._forget(call.key, done))
        return await asyncio.shield(self._tasks[call.key])  # a paid answer is recorded although nobody waits for it

    def _forget(self, key: str, task: asyncio.Task[dict[str, Any]]) -> None:
        """Removes a finished task, whose error may have nobody waiting for it."""
        del self._tasks[key]
        if not task.cancelled():
            task.exception()

    async def _fetch(self, call: Call) -> dict[str, Any]:
        """Sends a call when there is capacity, and records its answer."""
        async with self._slots, self.meter.reserve(call) as allowed:
            if not allowed:
                self._stop(
                    CostLimitReached(
                        f"{self.endpoint.base_url}: another request could exceed max_cost {self.endpoint.max_cost:g} "
                        f"(spent: US$ {self.meter.cost or 0.0:.4f}); raise max_cost and {self._fix}."
                    )
                )
            try:
                answer = await self._send_until_answered(call)
                self.meter.answers += 1
                self.meter.usage += Usage.from_json(answer)
                if self._ledger is not None:
                    self._ledger.add(call, answer, self._key)
            except RequestRejected:
                raise
            except UserError as error:
                self._stop(error)
                raise
            return answer

    async def _send_until_answered(self, call: Call) -> dict[str, Any]:
        """Repeats attempts that fail; in between waits longer each time, or as long as the endpoint asks."""
        for attempt in range(1, self.endpoint.max_attempts + 1):
            if self._end is not None:
                raise self._end
            try:
                return await self._send(call)
            except _Failed as failure:
                self.meter.failures += 1
                reason, wait = str(failure), failure.wait
            if attempt < self.endpoint.max_attempts:
                backoff = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * self._random.uniform(0.75, 1.0)
                await self._wait(backoff if wait is None else wait)
        raise EndpointError(
            f"{self.endpoint.base_url}: no answer in {self.endpoint.max_attempts} attempts ({reason}); {self._fix}."
        )

    async def _wait(self, seconds: float) -> None:
        """Waits, but not after the end of the client."""
        try:
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        except TimeoutError:
            return

    async def _send(self, call: Call) -> dict[str, Any]:
        """One attempt."""
        from openai import APIConnectionError, APIStatusError

        url = f"{self.endpoint.base_url.rstrip('/')}{call.path}"
        try:
            async with asyncio.timeout(self.endpoint.timeout):  # the client's own limit holds between two packets
                text = await self._openai.post(url, cast_to=str, body=call.body)
        except TimeoutError as error:
            raise _Failed(f"no answer within {self.endpoint.timeout:g} s") from error
        except APIStatusError as error:
            raise self._status_error(error) from error
        except APIConnectionError as error:
            raise _Failed(self._safe(describe(error.__cause__ or error))) from error
        try:
            answer = json.loads(text)
        except ValueError as error:
            raise _Failed("the answer is not JSON") from error
        if not isinstance(answer, dict):
            raise _Failed("the answer is not a JSON object")
        if call.path == "/chat/completions" and not answer.get("choices"):  # some proxies report errors with status 200
            raise _Failed(one_line(self._safe(f"the answer has no choices: {answer.get('error') or answer}")))
        return answer

    def _status_error(self, error: APIStatusError) -> Exception:
        """What an error status means for the call."""
        status, url = error.status_code, self.endpoint.base_url
        message = error.body.get("message") if isinstance(error.body, dict) else None
        reason = f"status {status}: {self._safe(one_line(str(message or error.message)))}"
        if error.code == "insufficient_quota":
            return EndpointError(f"{url}: {reason}; add credit to the account and {self._fix}.")
        if status in (408, 409, 429) or status >= 500:
            return _Failed(reason, _retry_after(error.response.headers.get("retry-after")))
        if status in _REFUSED:
            return RequestRejected(f"{url}: the request was refused ({reason}); change the request.")
        if status in (401, 403):
            variable = self.endpoint.api_key_variable
            fix = (
                "set api_key_variable"
                if variable is None
                else f"set the environment variable {variable} to a valid key"
            )
            return EndpointError(f"{url}: the API key is rejected or missing ({reason}); {fix} and {self._fix}.")
        return EndpointError(f"{url}: {reason}; check base_url and model, and {self._fix}.")

    def _safe(self, text: str) -> str:
        """The text without the API key, which servers may repeat."""
        return redact(text, self._key)


def _retry_after(header: str | None) -> float | None:
    """Seconds in a Retry-After header, at most two minutes; None if there are none."""
    try:
        return min(max(float(header or ""), 0.0), 2 * LONGEST_WAIT)
    except ValueError:
        return None
