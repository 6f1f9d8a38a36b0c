"""The progress of requests."""

from __future__ import annotations

import pytest

from rlmt.endpoints import Endpoint, Meter, Usage
from rlmt.endpoints import progress as module
from rlmt.endpoints.progress import describe_meter, track_requests


def meter(price: float | None) -> Meter:
    found = Meter(Endpoint("http://127.0.0.1:1", input_price=price, output_price=price), Usage(400_000, 100_000))
    found.failures = 1200
    return found


def test_unknown_prices_count_tokens() -> None:
    assert describe_meter(meter(None)) == "1,200 failed · 500,000 tokens"
    assert describe_meter(meter(2.5)) == "1,200 failed · US$ 1.25"


def test_without_terminal_lines_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", -1.0)
    with track_requests("distill", 3, meter(2.5)) as progress:
        progress.advance()
        progress.advance()
    assert "distill: 2 of 3 · 1,200 failed · US$ 1.25" in capsys.readouterr().err.splitlines()
