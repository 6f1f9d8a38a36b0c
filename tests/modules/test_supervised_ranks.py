"""Two ranks that share the rows of SFT or of a reward model take the steps that one process takes on all rows."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.slow
CASES = ["sft", "sft, adapter", "sft, from scratch by Muon", "reward", "reward, adapter"]


@pytest.fixture(scope="module")
def results(
    tiny: Path,
    demonstrations: Path,
    preferences: Path,
    run_ranks: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = {"policy": str(tiny / "policy"), "sft": str(demonstrations), "reward": str(preferences)}
    run_ranks(Path(__file__).with_name("two_supervised_ranks.py"), folder, port, paths)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    assert scale > 0
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_take_the_steps_of_one(case: str, strategy: str, results: list[dict[str, Any]]) -> None:
    alone, (first, second) = results[0]["alone"][case], (rank[strategy][case] for rank in results)
    muon = "Muon" in case  # Muon computes in bfloat16
    for ours in (first, second):
        assert len(ours["steps"]) == len(alone["steps"]) == 2
        assert_close(ours["steps"][0], alone["steps"][0], 1e-5)
        assert_close(ours["steps"][1], alone["steps"][1], 0.05 if muon else 5e-5)
        assert ours["metrics"].keys() == alone["metrics"].keys() >= {"val/loss"}
        assert ours["metrics"] == pytest.approx(alone["metrics"], rel=0.02 if muon else 1e-4, abs=1e-6)
        assert all(
            torch.equal(ours["steps"][k][name], grad) for k in (0, 1) for name, grad in first["steps"][k].items()
        )
    assert_close(first["weights"], alone["weights"], 1e-2 if muon else 1e-5)
    assert first["state"]["state"].keys() == alone["state"]["state"].keys()


@pytest.mark.parametrize("case", CASES)
def test_only_sharded_ranks_run_equally_many_micro_batches(case: str, results: list[dict[str, Any]]) -> None:
    """Micro-batches of a validation batch, two steps and two validation batches; rank 1 has no row of the last one."""
    counts = {strategy: [rank[strategy][case]["counts"] for rank in results] for strategy in ("ddp", "fsdp")}
    assert [len(each) for pair in counts.values() for each in pair] == [5] * 4
    assert counts["ddp"][0] != counts["ddp"][1] and counts["ddp"][1][-1] == 0 < counts["ddp"][0][-1]
    assert counts["fsdp"][0] == counts["fsdp"][1] == [max(pair) for pair in zip(*counts["ddp"], strict=True)]


def test_two_ranks_run_every_case(results: list[dict[str, Any]]) -> None:
    assert list(results[0]["alone"]) == CASES
