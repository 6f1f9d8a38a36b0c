"""Two processes that share a batch, evenly or not, take the step that one takes with all of it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

CASES = [
    *("token_mean", "sequence_mean", "constant", "one rank has no group", "whitening over ranks", "critic", "pairs"),
    *("adapter", "critic with an adapter", "tied", "checkpointed", "minibatches"),
]

WAYS = [(case, how) for how in ("shared", "sharded") for case in CASES]
WAYS += [(case, "offloaded") for case in ("token_mean", "critic with an adapter")]


@pytest.fixture(scope="module")
def results(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("two_ranks.py")
    command = [sys.executable, str(script)]
    ranks = [subprocess.Popen([*command, str(rank), str(folder), str(tiny / "reward")]) for rank in range(2)]
    assert [rank.wait(timeout=500) for rank in ranks] == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize(("case", "how"), WAYS)
def test_two_ranks_take_the_step_of_one(case: str, how: str, results: list[dict[str, Any]]) -> None:
    alone = results[0]["alone"][case]
    for rank in results:
        shared = rank[how][case]
        assert len(shared["steps"]) == len(alone["steps"]) == (2 if case == "minibatches" else 1)
        if case != "minibatches":  # each rank mixes its own groups
            assert_same(shared["steps"][0], alone["steps"][0], 1e-5)
            assert shared["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("case", "how"), WAYS)
def test_ranks_have_the_same_gradient_bit_for_bit(case: str, how: str, results: list[dict[str, Any]]) -> None:
    left, right = (rank[how][case]["steps"] for rank in results)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_case_is_tested(results: list[dict[str, Any]]) -> None:
    assert list(results[0]["shared"]) == CASES


def test_a_sharded_policy_is_given_away_a_tensor_at_a_time(results: list[dict[str, Any]]) -> None:
    for rank in results:
        bytes_ = rank["streamed"]
        assert bytes_["model"] > 200e6 and bytes_["largest"] < 7e6
        assert 0 < bytes_["peak"] < 10 * bytes_["largest"]


def test_a_reward_model_in_shards_scores_as_a_whole_one(results: list[dict[str, Any]]) -> None:
    """The first rank has four conversations in more batches than the second, which has one."""
    first, second = (rank["scores"]["sharded"] for rank in results)
    alone = results[0]["scores"]["alone"]
    assert len(set(alone.tolist())) == 5
    torch.testing.assert_close(torch.cat([first, second]), alone, rtol=1e-5, atol=1e-6)


def test_what_fails_on_one_rank_fails_on_all_and_is_told_once(results: list[dict[str, Any]]) -> None:
    for rank, told in zip(results, (False, True), strict=True):
        assert rank["failures"] == [("wrong", told), ("rank 1 failed: KeyError: 'x'", None)] * 2
