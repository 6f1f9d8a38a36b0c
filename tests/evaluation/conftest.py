"""A small benchmark, a tiny policy with its format, and loopback judges."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
sys.path += [str(FOLDER), str(FOLDER.parent / "endpoints")]

from loopback import KEY, Loopback, Reply  # noqa: E402

from rlmt.evaluation.benchmark import Item  # noqa: E402
from rlmt.formats.thinking import ThinkingFormat  # noqa: E402


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


@pytest.fixture(scope="session")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`exported("think")`: the tiny policy as `rlmt export` writes it, with its thinking format."""
    root = tmp_path_factory.mktemp("exported")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            shutil.copytree(tiny / "policy", root / name)
            ThinkingFormat(name).save(root / name)  # type: ignore[arg-type]
        return root / name

    return folder


@pytest.fixture
def items() -> list[Item]:
    """Seven items with prompts of different lengths."""
    texts = ["Hi", "Tell me about the sun.", "Why?", "Count: one two three", "A poem", "Say cat", "Is it red or blue?"]
    return [Item(f"item-{i}", [{"role": "user", "content": text}]) for i, text in enumerate(texts)]
