"""Two ranks over the same servers: who gives them weights, who asks which, and how both end where one has to."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_engine import KEY, Fake, mode, spoil  # noqa: E402

sys.path.pop(0)

GONE = "no vLLM server can be used"


class NotForTheSecond(Fake):
    """Is gone for the rank whose prompts are 100 and above."""

    def complete(self, body: dict[str, Any]) -> Any:
        if body["prompt"][0] >= 100:
            raise ConnectionResetError
        return super().complete(body)


def set_up() -> dict[str, list[Fake]]:
    """A pair of servers for each case."""
    names = ("shared_out", "one_dies", "no_server_takes_weights", "misconfigured", "the_disk_is_full", "an_adapter")
    cases = {name: [Fake(), Fake()] for name in (*names, "back_between_rollouts", "an_error_of_one")}
    cases["none_left_for_the_second_rank"] = [NotForTheSecond(), NotForTheSecond()]
    cases["one_dies"][0].script = spoil("/v1/completions", ConnectionResetError, first=4)
    for fake in cases["no_server_takes_weights"]:
        fake.script = spoil("/collective_rpc", 500)
    mode("generation_config", "auto")(cases["misconfigured"][1])
    cases["back_between_rollouts"][1].script = lambda path, number: (
        500 if path == "/collective_rpc" and number < 3 else None
    )
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


def check_error(results: Any, case: str, says: str) -> None:
    """Both ranks end with the same line, and one prints it."""
    left, right = (rank[case] for rank in results[1])
    assert left["message"] == right["message"] and says in left["message"] and "\n" not in left["message"]
    assert left["error"] == right["error"] == "SharedError" and (left["told"], right["told"]) == (False, True)


def test_each_draws_its_own_and_the_first_alone_gives_weights(results: Any) -> None:
    for rank in range(2):
        check(results[1][rank]["shared_out"], rank, 2)
    servers = results[0]["shared_out"]
    assert [fake.prompts[:2] for fake in servers] == [[0, 0], [100, 100]]  # ranks begin with different servers
    assert all(fake.calls.count("/collective_rpc") == 2 and fake.most <= 4 for fake in servers)
    assert all({prompt // 100 for prompt in fake.prompts} == {0, 1} for fake in servers)


def test_a_server_that_dies_costs_its_requests_on_both(results: Any) -> None:
    for rank in range(2):
        check(results[1][rank]["one_dies"], rank, 1)
    assert len(results[0]["one_dies"][0].prompts) == 3


def test_where_one_has_no_server_left_both_end(results: Any) -> None:
    first = results[0]["none_left_for_the_second_rank"][0]
    check_error(results, "none_left_for_the_second_rank", f"{first.url} is gone")
    check_error(results, "no_server_takes_weights", "could not load the policy's weights")
    for case in ("none_left_for_the_second_rank", "no_server_takes_weights"):
        assert results[1][0][case]["message"].startswith(GONE)
        assert results[1][0][case]["message"].endswith("; start them and go on with --ckpt_path last")


def test_a_full_disk_ends_both_though_weights_are_put_together_by_both(results: Any) -> None:
    check_error(results, "the_disk_is_full", "No space left on device); make room, and go on with --ckpt_path last")


def test_a_server_that_is_not_what_the_run_needs_is_told_once(results: Any) -> None:
    bad = results[0]["misconfigured"][1]
    check_error(results, "misconfigured", f"vLLM server {bad.url} has generation_config auto")


def test_a_server_that_is_back_is_given_weights_once_and_used_by_both(results: Any) -> None:
    for rank in range(2):
        check(results[1][rank]["back_between_rollouts"], rank, 1)
    back = results[0]["back_between_rollouts"][1]
    assert back.calls.count("/collective_rpc") == 3 and back.calls.count("/update_weight_version") == 1
    assert {prompt // 100 for prompt in back.prompts} == {0, 1}


def test_the_base_of_an_adapter_is_put_together_by_both_once(results: Any) -> None:
    for rank in range(2):
        outcome = results[1][rank]["an_adapter"]
        assert {row[0] for row in outcome["logprobs"]} == {5.0} and outcome["version"] == 2
    for fake in results[0]["an_adapter"]:
        assert fake.calls.count("/collective_rpc") == 1 and len(fake.adapters) == 1


def test_an_error_that_is_no_mistake_of_the_users_is_named_with_its_rank_on_all(results: Any) -> None:
    one, other = (rank["an_error_of_one"] for rank in results[1])
    for rank in (one, other):
        assert rank["error"] == "RankFailed" and rank["message"].startswith("rank 1 failed: ZeroDivisionError: ")
