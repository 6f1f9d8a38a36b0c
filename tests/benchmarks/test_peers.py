"""benchmarks/peers.py: its table, and a run of rlmt alone; TRL takes a network."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

ROOT = Path(__file__).parents[2]


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import peers

    yield peers
    sys.modules.pop("peers")


def test_table_has_medians_of_the_steps_after_the_first(peers: Any, tmp_path: Path) -> None:
    steps = [
        {"seconds": 90.0, "tokens": 1.0, "since_start": 99.0},
        {"seconds": 2.0, "tokens": 1000.0, "since_start": 101.0},
        {"seconds": 5.0, "tokens": 1500.0, "since_start": 106.0},
        {"seconds": 4.0, "tokens": 1600.0, "since_start": 110.0},
    ]
    (tmp_path / "rlmt.json").write_text(json.dumps({"steps": steps, "memory": 2_500_000_000}))
    console = Console(width=200, record=True)
    console.print(peers.table_of(tmp_path, ["rlmt"]))
    (row,) = (line.split("│") for line in console.export_text().splitlines() if "rlmt" in line)
    assert [cell.strip() for cell in row[1:-1]] == ["rlmt", "4.0", "400", "99", "2.50"]


@pytest.mark.slow
def test_rlmt_is_measured(peers: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    peers.main(["--out", str(tmp_path), "--peers", "rlmt", "--steps", "1"])
    figures = json.loads((tmp_path / "rlmt.json").read_text())
    assert len(figures["steps"]) == 2 and figures["memory"] > 1e8
    assert all(0 < step["seconds"] < step["since_start"] and step["tokens"] > 64 for step in figures["steps"])
    assert "rlmt" in capfd.readouterr().out
