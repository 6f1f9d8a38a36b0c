"""Two ranks that share a batch, evenly or not, take the optimizer step that one process takes on all of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

CASES = [
    *("token_mean", "sequence_mean", "constant", "one rank has no group", "whitening over ranks", "critic", "pairs"),
    *("adapter", "critic with an adapter", "tied", "checkpointed", "packed", "minibatches"),
]

CASES_AND_STRATEGIES = [(case, strategy) for strategy in ("shared", "sharded") for case in CASES]
CASES_AND_STRATEGIES += [(case, "offloaded") for case in ("token_mean", "critic with an adapter")]


@pytest.fixture(scope="module")
def results(
    tiny: Path, run_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(Path(__file__).with_name("two_ranks.py"), folder, str(tiny / "reward"))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize(("case", "strategy"), CASES_AND_STRATEGIES)
def test_two_ranks_take_the_step_of_one(case: str, strategy: str, results: list[dict[str, Any]]) -> None:
    alone = results[0]["alone"][case]
    for rank in results:
        shared = rank[strategy][case]
        assert len(shared["steps"]) == len(alone["steps"]) == (2 if case == "minibatches" else 1)
        if case != "minibatches":  # each rank shuffles its own groups into minibatches
            assert_same(shared["steps"][0], alone["steps"][0], 1e-5)
            assert shared["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("case", "strategy"), CASES_AND_STRATEGIES)
def test_gradients_are_bit_identical_on_both_ranks(case: str, strategy: str, results: list[dict[str, Any]]) -> None:
    left, right = (rank[strategy][case]["steps"] for rank in results)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_two_ranks_run_every_case(results: list[dict[str, Any]]) -> None:
    assert list(results[0]["shared"]) == CASES


def test_engine_sync_all_gathers_one_tensor_at_a_time(results: list[dict[str, Any]]) -> None:
    for rank in results:
        bytes_ = rank["streamed"]
        assert bytes_["model"] > 200e6 and bytes_["largest"] < 7e6
        assert 0 < bytes_["peak"] < 10 * bytes_["largest"]


def test_sharded_reward_model_scores_as_the_unsharded_one(results: list[dict[str, Any]]) -> None:
    """Rank 0 has four conversations and more batches than rank 1, which has one conversation."""
    first, second = (rank["scores"]["sharded"] for rank in results)
    alone = results[0]["scores"]["alone"]
    assert len(set(alone.tolist())) == 5
    torch.testing.assert_close(torch.cat([first, second]), alone, rtol=1e-5, atol=1e-6)


def test_failure_of_one_rank_is_raised_on_all_and_reported_once(results: list[dict[str, Any]]) -> None:
    for rank, reported_elsewhere in zip(results, (False, True), strict=True):
        assert rank["failures"] == [("wrong", reported_elsewhere), ("rank 1 failed: KeyError: 'x'", None)] * 2


def test_models_loaded_by_rank_0_equal_those_that_every_rank_loads(results: list[dict[str, Any]]) -> None:
    """Shards, adapters, buffers that are in no checkpoint, ties and the random state after loading, bit for bit."""
    for rank in results:
        everywhere, from_rank_0 = rank["loaded"]["states"]
        assert len(everywhere) > 100
        for (name, trained, expected), (same_name, same_trained, found) in zip(everywhere, from_rank_0, strict=True):
            assert (name, trained, expected.dtype) == (same_name, same_trained, found.dtype)
            assert torch.equal(expected, found), name
        assert torch.equal(*rank["loaded"]["logprobs"])


def test_fingerprint_does_not_depend_on_sharding(results: list[dict[str, Any]]) -> None:
    (digest,) = {digest for rank in results for digest in rank["loaded"]["digests"]}
    assert len(digest) == 32


def test_only_rank_0_holds_a_whole_model_while_it_is_loaded(results: list[dict[str, Any]]) -> None:
    """Rank 1 receives a block of an eighth at a time; the shards of both are a half. The peaks are of the process."""
    first, second = (rank["loaded"] for rank in results)
    assert first["peak"] > 0.9 * first["model"] > 200e6
    assert second["peak"] < 0.9 * second["model"]
    for rank in (first, second):
        assert rank["kept"] <= 0.51 * rank["model"]


def test_error_of_rank_0_while_it_loads_is_raised_on_all_ranks(results: list[dict[str, Any]]) -> None:
    assert [rank["loaded"]["raised"] for rank in results] == ["wrong", "wrong"]
