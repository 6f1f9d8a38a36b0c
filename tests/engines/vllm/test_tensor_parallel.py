"""Tensor parallelism of vLLM over two ranks; tests/end_to_end/test_fsdp.py trains with it."""

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


@pytest.mark.slow
@needs_vllm
def test_logprobs_equal_the_policys_and_layers_are_sharded(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert found["shape"] == (384 // 2, 2 // 2)  # rows are padded to a multiple of 64
        assert max(found["mismatch"]) < 1e-3 and found["stale"] > 1e-2
        assert found["missing weight"].startswith("1 of the policy's weights were not passed to sync")


@pytest.mark.slow
@needs_vllm
def test_samples_do_not_depend_on_the_rank_that_requests_them(results: list[dict[str, Any]]) -> None:
    first, second = results
    assert [len(found["uneven"]) for found in (first, second)] == [6, 4]
    assert [first["one rank requests"], second["one rank requests"]] == [first["uneven"] + second["uneven"], []]
    for found in (first, second):
        assert found["after an error"] == found["uneven"] and found["no rank requests"] == []


@pytest.mark.slow
@needs_vllm
def test_too_long_prompt_raises_on_all_ranks_of_the_group(results: list[dict[str, Any]]) -> None:
    first, second = (rank["error"] for rank in results)
    assert first == second and "256 tokens leaves no room" in first


@needs_vllm
@pytest.mark.slow
def test_merged_adapters_are_sharded(run_case: Callable[[str], Any]) -> None:
    for mismatches in run_case("merged"):
        synced, stale = mismatches[::2], mismatches[1::2]
        assert len(synced) == 2 and max(synced) < 1e-3 and min(stale) > 1e-2


@pytest.mark.parametrize(
    ("size", "ranks", "message"),
    [
        (2, 1, r"tensor_parallel_size is 2, but this run has one process: set .*--trainer\.devices 2"),
        (3, 4, r"tensor_parallel_size is 3: it must divide the 4 processes"),
        (4, 2, r"tensor_parallel_size is 4: it must divide the 2 processes"),
    ],
)
def test_check_ranks_rejects_indivisible_world_sizes(size: int, ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_ranks(size, ranks)
    assert "\n" not in str(caught.value)


def test_check_ranks_accepts_divisible_world_sizes() -> None:
    for size, ranks in ((1, 1), (1, 3), (2, 2), (2, 6), (8, 16)):
        check_ranks(size, ranks)


@pytest.mark.parametrize(("size", "message"), [(8, "12 attention heads"), (3, "4 key-value heads")])
def test_check_policy_rejects_indivisible_heads(size: int, message: str) -> None:
    config = LlamaConfig(hidden_size=96, num_attention_heads=12, num_key_value_heads=4)
    with pytest.raises(UserError, match=f"tensor_parallel_size is {size}: it must divide the policy's {message}"):
        VLLMEngine(tensor_parallel_size=size).check_policy(config)
    for divisor in (1, 2, 4, 12):  # with 12, each rank has a copy of one key-value head
        check_heads(divisor, config)


@needs_vllm
@pytest.mark.parametrize(
    ("ranks", "message"), [(1, "run has one process"), (8, "divide the policy's 2 attention heads")]
)
def test_invalid_size_ends_the_run_before_any_model_is_loaded(
    ranks: int,
    message: str,
    tiny: Path,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def forbidden(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_policy", forbidden)
    monkeypatch.setattr("rlmt.engines.vllm.engine.collectives", SimpleNamespace(world_size=lambda: ranks))
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
    assert "--data.engine.tensor_parallel_size is 8" in line and message in line
