"""Connections with the openai client, and descriptions of their errors."""

from __future__ import annotations

import importlib.util
import ssl
from functools import cache
from typing import TYPE_CHECKING

from rlmt.errors import UserError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a connection."""


def require_client_libraries(user: str) -> None:
    """Checks that the client libraries are installed.

    Args:
        user: What needs them, for the message.

    Raises:
        UserError: They are not.
    """
    if any(importlib.util.find_spec(name) is None for name in ("httpx", "openai")):
        raise UserError(f"{user} needs httpx and openai, which are not installed: pip install httpx openai.")


def open_client(base_url: str, key: str | None, timeout: float) -> AsyncOpenAI:
    """An openai client, to be used as an asynchronous context manager.

    It does not retry: its retries use Python's global random numbers, which would change a run, and are not counted.

    Args:
        base_url: URL before the path of a request.
        key: API key, or None.
        timeout: Seconds to wait for data of an answer.
    """
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

    return AsyncOpenAI(
        api_key=key or "none",  # None would send the key of OPENAI_API_KEY to any host
        base_url=base_url,
        timeout=Timeout(timeout, connect=CONNECT_TIMEOUT),
        max_retries=0,
        http_client=DefaultAsyncHttpxClient(verify=ssl_context()),
    )


@cache
def ssl_context() -> ssl.SSLContext:
    """The SSL context, created once: loading certificates takes longer than most requests."""
    import httpx

    return httpx.create_ssl_context()


def describe(error: BaseException) -> str:
    """The error's message, or its type if the message is empty."""
    return one_line(str(error)) or type(error).__name__


def one_line(text: str) -> str:
    """The text as one line of at most 300 characters, without a final full stop."""
    return " ".join(text.split())[:300].rstrip(".")
