"""benchmarks/gpu.py: its report, its time limits, its counts of operations, and on two CPU cores all of its parts."""

from __future__ import annotations

import importlib.util
import json
import math
import struct
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import gpu

        yield gpu


def part_that_runs(gpu: Any, script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The rows of a part whose process is a shell script; part 1 has its time limit multiplied by 0.04: a second."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    report = gpu.Report(folder)
    report.start("test")
    gpu.run_part(1, Namespace(patience=0.04, out=folder, device="cpu", size="tiny"), report)
    rows: list[dict[str, Any]] = report.rows()
    return rows


@pytest.mark.parametrize(
    ("script", "figure", "status"),
    [("exit 0", "time of the part", ""), ("exit 3", "not complete", "FAILED"), ("sleep 60", "not complete", "FAILED")],
)
def test_part_that_fails_or_takes_too_long_is_a_failure(
    gpu: Any, script: str, figure: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = part_that_runs(gpu, script, tmp_path, monkeypatch)
    assert (row["part"], row["figure"], row["status"]) == (1, figure, status)


def test_missing_package_skips_a_part(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.PARTS, 1, gpu.Part("title", "none:none", 1, ("json", "no_such_package")))
    (row,) = part_that_runs(gpu, "exit 1", tmp_path, monkeypatch)
    assert (row["status"], row["value"]) == ("skipped", "not installed: no_such_package")


@pytest.mark.parametrize(("difference", "status"), [(0.1, "ok"), (0.2, "FAILED"), (math.nan, "FAILED")])
def test_difference_above_its_limit_fails(gpu: Any, difference: float, status: str, tmp_path: Path) -> None:
    report = gpu.Report(tmp_path, 2)
    report.start("test")
    report.equal("gap", difference, 0.1)
    assert report.rows()[0]["status"] == status
    assert f"| 2 | gap | {difference:.3g} |  | at most 0.1 | {status} |" in (tmp_path / "gpu.md").read_text()


def test_counted_operations_are_those_of_torch(gpu: Any) -> None:
    """Forward and backward of all weights, whose attention torch counts without the causal mask."""
    import gpu_models

    setup = gpu_models.Setup("tiny", "cpu", Path(), None)
    config, rows, prompt, completion = setup.config(), 2, 6, 5
    length = prompt + completion - 1
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            hidden = model.model(torch.zeros(rows, length, dtype=torch.long)).last_hidden_state
            model.lm_head(hidden[:, -completion:]).sum().backward()
    attention = 3 * 2.0 * rows * config.num_hidden_layers * length * length * config.hidden_size
    expected = counter.get_total_flops() - attention
    assert gpu_models.update_flops(config, rows, prompt, completion, 0, lora=False) == pytest.approx(expected, rel=0.01)


def test_gradients_that_differ_or_lack_are_found(gpu: Any) -> None:
    import gpu_models

    ours, theirs = {"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([3.0, 4.5])}
    assert gpu_models.relative(ours, theirs) == pytest.approx(0.5 / math.hypot(3, 4.5))
    assert math.isnan(gpu_models.relative(ours, {"b": theirs["a"]}))


@pytest.fixture(scope="module")
def packages() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_packages", ROOT / "scripts" / "gpu_packages.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bitsandbytes_is_cut_to_one_library(packages: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bitsandbytes"
    folder.mkdir()
    for name in ("__init__.py", *(f"libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda128", "cuda130"))):
        (folder / name).touch()
    packages.cut_bitsandbytes(tmp_path, "130")
    assert sorted(path.name for path in folder.iterdir()) == ["__init__.py", "libbitsandbytes_cuda130.so"]
    with pytest.raises(SystemExit, match="cuda129"):
        packages.cut_bitsandbytes(tmp_path, "129")


def test_gpu_code_of_one_capability_stays(packages: Any) -> None:
    """Two containers between other bytes; their entries are PTX or machine code, of 4 or 8 bytes."""

    def entry(kind: int, capability: int, code: bytes) -> bytes:
        return struct.pack("<HHIQIIHHI", kind, 257, 32, len(code), 0, 0, 0, 1, capability) + code

    def container(*entries: bytes) -> bytes:
        return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(b"".join(entries))) + b"".join(entries)

    def library(*codes: bytes) -> bytes:
        first = container(entry(2, 80, codes[0]), entry(2, 90, codes[1]), entry(1, 90, codes[2]))
        return b"ELF" + first + b"text" + container(entry(2, 120, codes[3])) + b"end"

    original = library(b"sm80", b"sm90code", b"ptx9", b"sm120cod")
    assert packages.cut_gpu_code(original, 90) == library(bytes(4), b"sm90code", bytes(4), bytes(8))
    assert packages.cut_gpu_code(b"no container", 90) == b"no container"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    """With two layers; what needs a GPU or a missing package is skipped, and all equalities hold."""
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--out", tmp_path, "--device", "cpu", "--size", "tiny"]
    result = subprocess.run([*command, "--patience", "6"], capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert result.returncode == 0, result.stdout + result.stderr
    assert {row["part"] for row in rows} == set(range(1, 13))
    assert {row["status"] for row in rows} <= {"", "ok", "skipped", "missed"}
    equalities = {row["part"] for row in rows if row["target"].startswith("at most")}
    assert equalities == {2, 3, 5, 6, 8, 10, 11, 12}
    assert not (tmp_path / "work").exists()
