"""VLLMServerEngine on fake servers that fail, hang or restart during a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fake_server import SAMPLING, FakeServer, answer_with, check_samples, requests, start, sync

from rlmt.errors import UserError


def test_lost_server_is_replaced_and_used_again_when_it_is_back(
    fakes: list[FakeServer], tmp_path: Path, messages: list[str]
) -> None:
    engine = start(fakes, tmp_path, max_in_flight=2)
    sync(engine, 1)
    fakes[0].script = answer_with("/v1/completions", ConnectionResetError, first=4)
    check_samples(engine.generate(requests(10), SAMPLING), 10, 1)
    fakes[0].down = True
    assert len(messages) == 1
    assert messages[0].startswith(f"vLLM server {fakes[0].url} is not used for now: it cannot be reached (")
    done = len(fakes[0].prompts)
    check_samples(engine.generate(requests(10), SAMPLING), 10, 1)
    sync(engine, 2)
    check_samples(engine.generate(requests(10), SAMPLING), 10, 2)
    assert len(messages) == 1 and len(fakes[0].prompts) == done == 3
    fakes[0].restart()
    fakes[0].script = answer_with("", None)
    check_samples(engine.generate(requests(10), SAMPLING), 10, 2)  # without a sync: it loads the published weights
    assert messages[1:] == [f"vLLM server {fakes[0].url} is used again."] and len(fakes[0].prompts) > done
    assert fakes[0].weight == 2.0 and fakes[1].calls.count("/collective_rpc") == 2


def test_loss_of_all_servers_raises_with_every_reason(
    fakes: list[FakeServer], tmp_path: Path, messages: list[str]
) -> None:
    engine = start(fakes, tmp_path)
    sync(engine, 1)
    fakes[0].script = answer_with("/v1/completions", ConnectionResetError)
    fakes[1].script = answer_with("/v1/completions", 500)
    with pytest.raises(UserError) as caught:
        engine.generate(requests(10), SAMPLING)
    reasons = rf"{fakes[0].url} cannot be reached \(.*\); {fakes[1].url} answered with status 500: .*out of memory.*"
    fix = "start the servers and resume with --ckpt_path last."
    assert re.fullmatch(rf"--data.engine.urls: no vLLM server is usable \({reasons}\); {fix}", str(caught.value))
    for fake in fakes:
        fake.down = True
    with pytest.raises(UserError, match="no vLLM server is usable .*cannot be reached"):
        sync(engine, 2)
    with pytest.raises(RuntimeError, match="call sync before generate"):
        engine.generate(requests(1), SAMPLING)


def test_samples_of_a_restarted_server_are_generated_again(fakes: list[FakeServer], tmp_path: Path) -> None:
    engine = start(fakes, tmp_path)
    sync(engine, 1)

    def restart(path: str, number: int) -> None:
        if path == "/v1/completions" and number == 3:
            fakes[0].restart()

    fakes[0].script = restart
    check_samples(engine.generate(requests(10), SAMPLING), 10, 1)
    assert fakes[0].weight == 1.0 and fakes[0].calls.count("/collective_rpc") == 2
    fakes[0].restart()  # between two rollouts
    check_samples(engine.generate(requests(10), SAMPLING), 10, 1)


def test_samples_from_before_a_reload_are_generated_again(fakes: list[FakeServer], tmp_path: Path) -> None:
    """The server restarts, and another rank makes it load the same weights before this rank checks it again."""
    engine = start(fakes, tmp_path)
    sync(engine, 1)

    def restart(path: str, number: int) -> None:
        if path == "/v1/completions" and number == 3:
            fakes[0].weight = -1.0
        elif path == "/weight_info" and fakes[0].weight == -1.0:
            fakes[0].weight, fakes[0].label = 1.0, fakes[0].label.partition(".")[0] + ".reloaded"

    fakes[0].script = restart
    check_samples(engine.generate(requests(10), SAMPLING), 10, 1)
    assert fakes[0].calls.count("/collective_rpc") == 1 and len(fakes[0].prompts) > 10


def test_two_runs_on_one_server_raise(fakes: list[FakeServer], tmp_path: Path) -> None:
    one, other = start(fakes, tmp_path), start(fakes[:1], tmp_path)
    sync(one, 1)
    sync(other, 1)  # allowed, since it may be the run that resumes a killed one
    with pytest.raises(UserError, match=f"{fakes[0].url}: another run loads its weights there; give each run"):
        one.generate(requests(3), SAMPLING)


def test_server_that_fails_a_sync_is_not_used(fakes: list[FakeServer], tmp_path: Path, messages: list[str]) -> None:
    engine = start(fakes, tmp_path)
    sync(engine, 1)
    fakes[0].script = answer_with("/collective_rpc", 500)
    sync(engine, 2)
    assert len(messages) == 1 and "it could not load the policy's weights from" in messages[0]
    assert messages[0].endswith(": out of memory.")
    check_samples(engine.generate(requests(4), SAMPLING), 4, 2)
    assert fakes[0].prompts == [] and len(fakes[1].prompts) == 8


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        (
            "/v1/completions",
            {"choices": [{"index": 0, "text": "", "finish_reason": "abort"}]},
            "aborted a sample (finish reason abort)",
        ),
        ("/v1/completions", 404, "answered with status 404"),
    ],
)
def test_server_with_invalid_answers_is_not_used(
    path: str, answer: Any, message: str, fakes: list[FakeServer], tmp_path: Path, messages: list[str]
) -> None:
    engine = start(fakes, tmp_path)
    sync(engine, 1)
    fakes[0].script = answer_with(path, answer)
    check_samples(engine.generate(requests(4), SAMPLING), 4, 1)
    assert len(messages) == 1 and message in messages[0]


def test_server_that_exceeds_the_timeout_is_not_used(
    fakes: list[FakeServer], tmp_path: Path, messages: list[str]
) -> None:
    engine = start(fakes, tmp_path, timeout=0.5)
    sync(engine, 1)
    fakes[0].delay = 1.5
    check_samples(engine.generate(requests(4), SAMPLING), 4, 1)
    assert "it returned no sample within 0.5 s (--data.engine.timeout)" in messages[0]
