"""HTTP connection to one vLLM server, and the errors of a server that is not usable."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from rlmt.endpoints.connections import CONNECT_TIMEOUT, describe, one_line, open_client, ssl_context

if TYPE_CHECKING:
    import httpx

TIMEOUT = 10.0
"""Seconds to wait for short answers."""


class ServerLost(Exception):
    """The server is not usable; the message continues "vLLM server URL …" with the reason and, if known, the fix."""


class ServerConnection:
    """Sends requests to a vLLM server; requires an open connection (`connect`).

    Args:
        url: URL such as http://127.0.0.1:8000.
        key: API key, or None.
        key_variable: Environment variable of the API key, for messages.
        timeout: Seconds that a sample or a load of weights may take.
    """

    def __init__(self, url: str, key: str | None, key_variable: str, timeout: float) -> None:
        self.url = url
        self._key, self._key_variable = key, key_variable
        self._timeout = timeout

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[None]:
        """Opens connections to the server for one event loop."""
        import httpx

        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        client = open_client(f"{self.url}/v1", self._key, self._timeout)  # a lost request goes to another server
        http = httpx.AsyncClient(base_url=self.url, headers=headers, verify=ssl_context())
        async with http as self._http, client as self._openai:
            yield

    async def _request(self, method: str, path: str, timeout: float = TIMEOUT, **options: Any) -> httpx.Response:
        """Sends a request; ServerLost if the server does not answer or rejects the API key."""
        import httpx

        try:
            response = await self._http.request(
                method, path, timeout=httpx.Timeout(timeout, connect=CONNECT_TIMEOUT), **options
            )
        except httpx.TransportError as error:
            failure = "does not answer" if isinstance(error, httpx.ReadTimeout) else "cannot be reached"
            raise ServerLost(f"{failure} ({describe(error)})") from error
        if response.status_code in (401, 403):
            failure = "rejects the API key of" if self._key else "requires an API key, but none is set in"
            raise ServerLost(
                f"{failure} the environment variable {self._key_variable}; set it to the server's --api-key"
            )
        return response

    async def _request_json(
        self, method: str, path: str, fix: str, timeout: float = TIMEOUT, **options: Any
    ) -> dict[str, Any]:
        """Sends a request that must return a JSON object."""
        response = await self._request(method, path, timeout, **options)
        try:
            if response.status_code == 200 and isinstance(body := response.json(), dict):
                return body
        except ValueError:
            pass
        raise ServerLost(f"has no {path.partition('?')[0]} (status {response.status_code}); {fix}")

    async def _post(self, path: str, body: dict[str, Any], failure: str, timeout: float | None = None) -> None:
        """Sends a request that must succeed; `failure` begins the message of the ServerLost error."""
        response = await self._request("POST", path, timeout or self._timeout, json=body)
        if response.status_code != 200:
            try:
                reason = str(response.json()["error"]["message"])
            except (ValueError, KeyError, TypeError):
                reason = response.text
            raise ServerLost(f"{failure}: {one_line(reason)}")
