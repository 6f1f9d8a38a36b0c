"""The loopback servers of tests/endpoints and the real ones of tests/engines/vllm_server."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
sys.path += [str(FOLDER), str(FOLDER.parent / "endpoints"), str(FOLDER.parent / "engines" / "vllm_server")]

from loopback import KEY, Loopback, Reply  # noqa: E402


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str, Any], Reply]], Loopback]]:
    """Starts loopback servers that require the key in PLANTED_KEY; waits between attempts are short."""
    monkeypatch.setenv("PLANTED_KEY", KEY)
    monkeypatch.setattr("rlmt.endpoints.client.FIRST_WAIT", 0.001)
    started: list[Loopback] = []

    def start(script: Callable[[str, Any], Reply]) -> Loopback:
        started.append(Loopback(script, KEY))
        return started[-1]

    yield start
    for server in started:
        server.close()
