"""benchmarks/startup.py: durations of stages, and a real start."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def startup(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import startup

    yield startup
    sys.modules.pop("startup")


def test_a_stage_lasts_from_the_end_of_the_one_before(startup: Any) -> None:
    assert startup.durations(100.0, [103.0, 104.5, 110.0]) == [3.0, 1.5, 5.5]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_every_stage_of_a_start_takes_time(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks/startup.py")
    done = subprocess.run(
        [sys.executable, script, "--out", str(tmp_path), "--runs", "1"], check=True, capture_output=True, text=True
    )
    rows = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    seconds = {row[1].strip(): float(row[2]) for row in rows}
    assert len(seconds) == 7 and all(value >= 0 for value in seconds.values())
    assert seconds["sum"] == pytest.approx(sum(value for name, value in seconds.items() if name != "sum"), abs=0.4)
    assert seconds["imports"] > 1 and seconds["vLLM imported and started"] > 1
