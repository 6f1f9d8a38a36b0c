"""One vLLM over two processes, which both have to ask it. tests/test_fsdp.py trains with it."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from rlmt.cli.commands import main
from rlmt.engines import VLLMEngine
from rlmt.engines.vllm.tensor_parallel import check_heads, check_ranks
from rlmt.errors import UserError
from rlmt.models import loading

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def run_case(run_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """`run_case("merged")`: what a function of tp_ranks.py returns on each of two ranks."""

    def run(case: str) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        run_ranks(Path(__file__).with_name("tp_ranks.py"), folder, case)
        return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]

    return run


@pytest.fixture(scope="module")
def results(run_case: Callable[[str], Any]) -> list[dict[str, Any]]:
    return run_case("all_weights")


@needs_vllm
def test_together_they_are_the_policy_and_each_holds_a_part(results: list[dict[str, Any]]) -> None:
    for rank in results:
        found = rank
        assert found["shape"] == (384 // 2, 2 // 2)  # rows are filled up to a multiple of 64
        assert max(found["mismatch"]) < 1e-3 and found["stale"] > 1e-2
        assert found["refused"].startswith("1 of the policy's weights were not passed to sync")


@needs_vllm
def test_a_sample_is_the_same_whichever_rank_asks_for_it(results: list[dict[str, Any]]) -> None:
    first, second = results
    assert [len(found["uneven"]) for found in (first, second)] == [6, 4]
    assert [first["one rank asks"], second["one rank asks"]] == [first["uneven"] + second["uneven"], []]
    for found in (first, second):
        assert found["afterwards"] == found["uneven"] and found["nobody asks"] == []


@needs_vllm
def test_a_prompt_without_room_is_told_by_all_its_ranks(results: list[dict[str, Any]]) -> None:
    first, second = (rank["said"] for rank in results)
    assert first == second and "256 tokens leaves no room" in first


@needs_vllm
@pytest.mark.slow
def test_merged_adapters_are_cut_as_well(run_case: Callable[[str], Any]) -> None:
    for gaps in run_case("merged"):
        fresh, stale = gaps[::2], gaps[1::2]
        assert len(fresh) == 2 and max(fresh) < 1e-3 and min(stale) > 1e-2


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
@pytest.mark.parametrize(("ranks", "says"), [(1, "this run has one"), (8, "divide the policy's 2 attention heads")])
def test_a_run_that_it_does_not_fit_ends_before_any_model_is_loaded(
    ranks: int,
    says: str,
    tiny: Path,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def forbidden(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_policy", forbidden)
    monkeypatch.setattr("rlmt.engines.vllm.engine.ranks", SimpleNamespace(size=lambda: ranks))
    options = {
        "--model.policy": tiny / "policy",
        "--model.reward.model": tiny / "reward",
        "--data.prompts": prompts_file,
        "--data.batch_size": 4,
        "--data.max_prompt_tokens": 256,
        "--data.max_new_tokens": 8,
        "--data.val_size": 0,
        "--data.engine.tensor_parallel_size": 8,
        "--trainer.accelerator": "cpu",
        "--trainer.default_root_dir": tmp_path,
    }
    configs = [word for name in ("base", "grpo", "tiny") for word in ("--config", name)]
    assert main(["fit", *configs, *(str(word) for pair in options.items() for word in pair)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error")]
    assert "--data.engine.tensor_parallel_size is 8" in line and says in line
