"""One vLLM over two processes samples what a whole one in each does, and refuses what it cannot."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from rlmt.engines import VLLMEngine
from rlmt.engines.tensor_parallel import check_heads, check_ranks
from rlmt.errors import UserError

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("tp_ranks.py")
    ranks = [subprocess.Popen([sys.executable, str(script), str(rank), str(folder)]) for rank in range(2)]
    assert [rank.wait(timeout=500) for rank in ranks] == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@needs_vllm
def test_together_they_are_the_policy_and_each_holds_a_part(results: list[dict[str, Any]]) -> None:
    for rank in results:
        found = rank["together"]
        assert found["uneven"]["version"] == 2
        assert max(found["mismatch"]) < 1e-3 and found["stale"] > 1e-2
        assert rank["alone"]["held"] == found["whole"] and found["held"] < 0.6 * found["whole"]
        assert found["refused"].startswith("1 of the policy's weights were not passed to sync")


@needs_vllm
def test_samples_are_those_of_whole_engines_whoever_asks_for_them(results: list[dict[str, Any]]) -> None:
    both = []
    for rank in results:
        ours, theirs = (rank[how]["uneven"] for how in ("together", "alone"))
        assert ours["ids"] == theirs["ids"] == rank["together"]["afterwards"]["ids"]
        for left, right in zip(ours["logprobs"], theirs["logprobs"], strict=True):
            assert left == pytest.approx(right, abs=1e-4)
        both += ours["ids"]
        assert rank["together"]["nobody asks"]["ids"] == []
    assert [len(rank["together"]["uneven"]["ids"]) for rank in results] == [6, 4]
    asked = [rank["together"]["one rank asks"]["ids"] for rank in results]
    assert asked == [both, []]


@needs_vllm
def test_a_prompt_without_room_is_told_by_all_its_ranks(results: list[dict[str, Any]]) -> None:
    first, second = (rank["together"]["said"] for rank in results)
    assert first == second and "256 tokens leaves no room" in first
    assert [bool(rank["alone"]["said"]) for rank in results] == [False, True]


@needs_vllm
@pytest.mark.parametrize("serve", ["adapter", "merged"])
def test_adapters_are_cut_as_well(serve: str, results: list[dict[str, Any]]) -> None:
    for rank in results:
        fresh, stale = rank[serve][::2], rank[serve][1::2]
        assert len(fresh) == 3 and max(fresh) < 1e-3 and min(stale) > 1e-2


@pytest.mark.parametrize(
    ("size", "ranks", "says"),
    [
        (2, 1, r"tensor_parallel_size is 2: .*this run has one; set .*--trainer\.devices 2"),
        (3, 4, r"tensor_parallel_size is 3: it has to divide the 4 processes"),
        (4, 2, r"tensor_parallel_size is 4: it has to divide the 2 processes"),
        (0, 2, r"tensor_parallel_size is 0: give 1"),
    ],
)
def test_ranks_that_cannot_be_grouped_are_refused(size: int, ranks: int, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        check_ranks(size, ranks)
    assert "\n" not in str(caught.value)


def test_ranks_that_can_be_grouped_pass() -> None:
    for size, ranks in ((1, 1), (1, 3), (2, 2), (2, 6), (8, 16)):
        check_ranks(size, ranks)


@pytest.mark.parametrize(("size", "says"), [(8, "12 attention heads"), (3, "4 key-value heads")])
def test_heads_that_cannot_be_shared_out_are_refused(size: int, says: str) -> None:
    config = LlamaConfig(hidden_size=96, num_attention_heads=12, num_key_value_heads=4)
    with pytest.raises(UserError, match=f"tensor_parallel_size is {size}: it has to divide the policy's {says}"):
        VLLMEngine(tensor_parallel_size=size).check_policy(config)
    for fits in (1, 2, 4, 12):  # of key-value heads each of 12 ranks has a copy of one
        check_heads(fits, config)


@needs_vllm
def test_one_process_is_told_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match="this run has one"):
        VLLMEngine(tensor_parallel_size=2).check()
