"""Two ranks on the same fake servers: weights sync by rank 0, load balancing, and errors on all ranks."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nccl_stand_ins
import pytest
from fake_server import KEY, FakeServer, answer_with, set_model_config


class LostForRank1(FakeServer):
    """Closes the connections of rank 1, whose prompts are 100 and above."""

    def complete(self, body: dict[str, Any]) -> Any:
        if body["prompt"][0] >= 100:
            raise ConnectionResetError
        return super().complete(body)


def set_up() -> dict[str, list[FakeServer]]:
    """Two servers for each case."""
    names = ["load_balancing", "one_server_lost", "no_server_loads_weights", "misconfigured", "disk_full"]
    names += ["adapter_base", "server_restored", "error_on_one_rank"]
    cases = {name: [FakeServer(), FakeServer()] for name in names}
    cases["no_server_left_for_rank_1"] = [LostForRank1(), LostForRank1()]
    cases["one_server_lost"][0].script = answer_with("/v1/completions", ConnectionResetError, first=4)
    for fake in cases["no_server_loads_weights"]:
        fake.script = answer_with("/collective_rpc", 500)
    set_model_config("generation_config", "auto")(cases["misconfigured"][1])
    cases["server_restored"][1].script = lambda path, number: 500 if path == "/collective_rpc" and number < 3 else None
    return cases


@pytest.fixture(scope="module")
def results(run_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ranks")
    cases = set_up()
    (folder / "cases.json").write_text(json.dumps({case: [fake.url for fake in two] for case, two in cases.items()}))
    run_ranks(Path(__file__).with_name("two_ranks.py"), folder, environment={"VLLM_API_KEY": KEY})
    for two in cases.values():
        for fake in two:
            fake.http.shutdown()
    return cases, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def check(outcome: Any, rank: int, version: int) -> None:
    assert outcome["ids"] == [[100 * rank + i, 2 * i + k, 7] for i in range(6) for k in range(2)]
    assert outcome["logprobs"] == [[float(version), -0.25, 0.5]] * 12 and outcome["version"] == version


def check_error(results: Any, case: str, expected: str) -> None:
    """Checks that both ranks raise the same error, which rank 0 reports."""
    left, right = (rank[case] for rank in results[1])
    assert left["message"] == right["message"] and expected in left["message"] and "\n" not in left["message"]
    assert left["error"] == right["error"] == "AllRanksUserError"
    assert (left["reported_elsewhere"], right["reported_elsewhere"]) == (False, True)


def test_each_rank_samples_and_rank_0_loads_weights(results: Any) -> None:
    for rank in range(2):
        check(results[1][rank]["load_balancing"], rank, 2)
    servers = results[0]["load_balancing"]
    assert [fake.prompts[:2] for fake in servers] == [[0, 0], [100, 100]]  # ranks start with different servers
    assert all(fake.calls.count("/collective_rpc") == 2 and fake.max_outstanding <= 4 for fake in servers)
    assert all({prompt // 100 for prompt in fake.prompts} == {0, 1} for fake in servers)


def test_lost_server_is_replaced_on_both_ranks(results: Any) -> None:
    for rank in range(2):
        check(results[1][rank]["one_server_lost"], rank, 1)
    assert len(results[0]["one_server_lost"][0].prompts) == 3


def test_rank_without_a_server_stops_both_ranks(results: Any) -> None:
    first = results[0]["no_server_left_for_rank_1"][0]
    check_error(results, "no_server_left_for_rank_1", f"{first.url} cannot be reached")
    check_error(results, "no_server_loads_weights", "could not load the policy's weights")
    for case in ("no_server_left_for_rank_1", "no_server_loads_weights"):
        assert results[1][0][case]["message"].startswith("--data.engine.urls: no vLLM server is usable")
        assert results[1][0][case]["message"].endswith("; start the servers and resume with --ckpt_path last.")


def test_full_disk_stops_both_ranks_during_the_all_gather(results: Any) -> None:
    check_error(results, "disk_full", "No space left on device); free disk space and resume with --ckpt_path last.")


def test_misconfigured_server_is_reported_once(results: Any) -> None:
    bad = results[0]["misconfigured"][1]
    check_error(results, "misconfigured", f"vLLM server {bad.url} has generation_config auto")


def test_restored_server_is_loaded_once_and_used_by_both_ranks(results: Any) -> None:
    for rank in range(2):
        check(results[1][rank]["server_restored"], rank, 1)
    restored = results[0]["server_restored"][1]
    assert restored.calls.count("/collective_rpc") == 3 and restored.calls.count("/update_weight_version") == 1
    assert {prompt // 100 for prompt in restored.prompts} == {0, 1}


def test_base_of_an_adapter_is_all_gathered_once(results: Any) -> None:
    for rank in range(2):
        outcome = results[1][rank]["adapter_base"]
        assert {row[0] for row in outcome["logprobs"]} == {5.0} and outcome["version"] == 2
    for fake in results[0]["adapter_base"]:
        assert fake.calls.count("/collective_rpc") == 1 and len(fake.adapters) == 1


def test_internal_error_names_its_rank_on_all_ranks(results: Any) -> None:
    one, other = (rank["error_on_one_rank"] for rank in results[1])
    for rank in (one, other):
        assert rank["error"] == "RankFailed" and rank["message"].startswith("rank 1 failed: ZeroDivisionError: ")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_rank_0_sends_all_gathered_weights_by_nccl(
    run_ranks: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nccl_stand_ins.install(monkeypatch.setattr)
    monkeypatch.setattr(FakeServer, "communicator", nccl_stand_ins.GlooCommunicator)
    cases = {name: [FakeServer(), FakeServer()] for name in ("nccl", "nccl_lost")}
    for fake in (fake for two in cases.values() for fake in two):
        fake.config["weight_transfer_config"] = {"backend": "nccl"}
    restarted, lost = cases["nccl"][1], cases["nccl_lost"][1]
    restarted.script = lambda path, number: restarted.restart() if path == "/restart" else None
    lost.script = answer_with("/start_weight_update", 500)
    (tmp_path / "cases.json").write_text(json.dumps({case: [fake.url for fake in two] for case, two in cases.items()}))
    run_ranks(Path(__file__).with_name("two_ranks.py"), tmp_path, environment={"VLLM_API_KEY": KEY})
    outcomes = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for rank in range(2):
        check(outcomes[rank]["nccl"], rank, 2)
    for fake in cases["nccl"]:
        assert fake.calls.count("/init_weight_transfer_engine") == fake.calls.count("/update_weights") == 2
        assert {prompt // 100 for prompt in fake.prompts} == {0, 1}
    check_error((cases, outcomes), "nccl_lost", f"weight_transfer nccl: vLLM server {lost.url} could not prepare")
    for two in cases.values():
        for fake in two:
            fake.http.shutdown()
