"""Fake servers, and the import path of the helper modules in this folder, since test folders are not packages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
pytest.register_assert_rewrite("fake_server", "real_server")

from fake_server import KEY, FakeServer  # noqa: E402


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeServer]]:
    """Two fake servers."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    servers = [FakeServer(), FakeServer()]
    yield servers
    for server in servers:
        server.http.shutdown()


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings and infos that the engine logs."""
    lines: list[str] = []
    for name in ("engine.rank_zero_warn", "servers.rank_zero_warn", "servers.rank_zero_info"):
        monkeypatch.setattr(f"rlmt.engines.vllm_server.{name}", lines.append)
    return lines
