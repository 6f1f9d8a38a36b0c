"""The client of an endpoint, against loopback servers that fail in every way."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loopback import KEY, Loopback, Reply, completion

from rlmt.endpoints import (
    BackgroundClient,
    Call,
    ChatAnswer,
    CostLimitReached,
    Endpoint,
    EndpointClient,
    EndpointError,
    Ledger,
    RequestRejected,
    chat_call,
)

Serve = Callable[[Callable[[str, Any], Reply]], Loopback]


def endpoint(server: Loopback, **options: Any) -> Endpoint:
    return Endpoint(f"{server.url}/v1", "teacher", **{"api_key_variable": "PLANTED_KEY", "timeout": 5.0} | options)


def calls(of: Endpoint, count: int) -> list[Call]:
    return [chat_call(of, [{"role": "user", "content": str(i)}], temperature=0.5, max_tokens=20) for i in range(count)]


def question(body: Any) -> str:
    return str(body["messages"][0]["content"])


def post_all(of: Endpoint, ledger: Ledger | None, batch: list[Call]) -> tuple[list[Any], EndpointClient]:
    """Answers and errors in order."""

    async def run() -> tuple[list[Any], EndpointClient]:
        async with EndpointClient(of, ledger, "try again") as client:
            return await asyncio.gather(*map(client.post, batch), return_exceptions=True), client

    return asyncio.run(run())


def test_body_holds_model_messages_and_options(serve: Serve) -> None:
    server = serve(lambda path, body: completion("4", prompt_tokens=3))
    of = endpoint(server, options={"reasoning_effort": "none", "max_tokens": None, "max_completion_tokens": 7})
    ((answer,), client) = post_all(of, None, calls(of, 1))
    assert ChatAnswer.from_json(answer) == ChatAnswer("4", "stop")
    assert server.paths == ["/v1/chat/completions"]
    assert server.bodies == [
        {
            "model": "teacher",
            "messages": [{"role": "user", "content": "0"}],
            "temperature": 0.5,
            "reasoning_effort": "none",
            "max_completion_tokens": 7,
        }
    ]
    assert (client.meter.usage.prompt_tokens, client.meter.usage.completion_tokens, client.meter.cost) == (3, 5, None)


def test_failures_are_repeated_until_answered(serve: Serve) -> None:
    failures = [
        Reply({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.01"}),
        Reply(b"<html>oops", 500),
        Reply(b'{"choices": [{"mess'),
        Reply(b"[1]"),
        Reply(b'{"choices": []}', 200, {"Content-Length": "1000", "Connection": "close"}),
        Reply(drop=True),
    ]
    seen: Counter[str] = Counter()

    def script(path: str, body: Any) -> Reply:
        seen[question(body)] += 1
        number = int(question(body))
        return completion(f"to {number}") if seen[question(body)] > 1 else failures[number]

    server = serve(script)
    of = endpoint(server, timeout=1.0)
    state = random.getstate()
    answers, client = post_all(of, None, calls(of, len(failures)))
    assert [ChatAnswer.from_json(answer).text for answer in answers] == [f"to {i}" for i in range(len(failures))]
    assert set(seen.values()) == {2} and client.meter.failures == len(failures)
    assert random.getstate() == state


def test_timeout_is_repeated(serve: Serve) -> None:
    numbers = iter(range(9))
    server = serve(lambda path, body: completion("late") if next(numbers) else (time.sleep(0.6), completion("too"))[1])
    of = endpoint(server, timeout=0.2)
    answers, client = post_all(of, None, calls(of, 1))
    assert ChatAnswer.from_json(answers[0]).text == "late" and client.meter.failures == 1


def test_answer_without_choices_is_not_recorded(serve: Serve, tmp_path: Path) -> None:
    lost = {"on": True}
    error = Reply({"error": {"message": f"no credit for {KEY}"}})
    server = serve(lambda path, body: error if lost["on"] else completion("paid"))
    of = endpoint(server, max_attempts=2)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    (failure,), _ = post_all(of, ledger, calls(of, 1))
    assert isinstance(failure, EndpointError) and len(ledger) == 0 and len(server.bodies) == 2
    assert "no answer in 2 attempts (the answer has no choices: {'message': 'no credit for ***'}); try" in str(failure)
    lost["on"] = False
    (answer,), _ = post_all(of, ledger, calls(of, 1))
    assert ChatAnswer.from_json(answer).text == "paid" and len(ledger) == 1
    ledger.close()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply({"error": {"message": "busy"}}, 503), "no answer in 3 attempts (status 503: busy); try again."),
        (Reply(b"nonsense"), "no answer in 3 attempts (the answer is not JSON); try again."),
        (Reply(b"not here", 404), "check base_url and model, and try again."),
        (
            Reply({"error": {"message": f"{KEY} is bad"}}, 401),
            "environment variable PLANTED_KEY to a valid key and try",
        ),
        (Reply({"error": {"message": "no", "code": "insufficient_quota"}}, 429), "add credit to the account and try"),
    ],
)
def test_lost_endpoint_is_one_line_without_key(serve: Serve, reply: Reply, message: str) -> None:
    server = serve(lambda path, body: reply)
    of = endpoint(server, max_attempts=3, max_in_flight=2)
    errors, _ = post_all(of, None, calls(of, 50))
    assert all(isinstance(error, EndpointError) for error in errors)
    text = str(errors[0])
    assert text.startswith(f"{server.url}/v1: ") and message in text and text.endswith(".")
    assert "\n" not in text and KEY not in text
    assert len(server.bodies) <= 6  # the first error ends the client


def test_refused_call_does_not_end_the_client(serve: Serve) -> None:
    server = serve(
        lambda path, body: Reply({"error": {"message": "too long"}}, 400) if question(body) == "1" else completion("a")
    )
    of = endpoint(server)
    answers, _ = post_all(of, None, calls(of, 3))
    assert isinstance(answers[1], RequestRejected) and "(status 400: too long)" in str(answers[1])
    assert isinstance(answers[0], dict) and isinstance(answers[2], dict)


def test_requests_in_flight_are_bounded_and_equal_calls_sent_once(serve: Serve) -> None:
    server = serve(lambda path, body: (time.sleep(0.02), completion("a"))[1])
    of = endpoint(server, max_in_flight=3)
    answers, client = post_all(of, None, calls(of, 10) * 2)
    assert len(answers) == 20 and len(server.bodies) == client.meter.answers == 10
    assert server.max_outstanding == 3


def test_recorded_answers_are_not_requested_again(serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda path, body: completion(question(body), prompt_tokens=100, completion_tokens=50))
    of = endpoint(server, input_price=2.0, output_price=10.0)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    first, client = post_all(of, ledger, calls(of, 4))
    assert client.meter.cost == pytest.approx(4 * (100 * 2 + 50 * 10) / 1e6)
    ledger.close()
    ledger = Ledger(tmp_path / "ledger.jsonl")
    again, client = post_all(of, ledger, calls(of, 5))
    ledger.close()
    assert again[:4] == first and len(server.bodies) == 5
    assert (client.meter.reused, client.meter.answers) == (4, 1)
    assert client.meter.cost == pytest.approx(5 * 0.0007)


def test_cost_limit_is_never_exceeded(serve: Serve, tmp_path: Path) -> None:
    """A call may cost a cent per byte of its body and 20 cents of completion, but costs 10 cents and 5."""
    server = serve(lambda path, body: (time.sleep(0.01), completion("a"))[1])
    of = endpoint(server, input_price=10_000.0, output_price=10_000.0, max_cost=4.0)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    results, client = post_all(of, ledger, calls(of, 40))
    answered = [result for result in results if isinstance(result, dict)]
    errors = [result for result in results if not isinstance(result, dict)]
    assert errors and all(isinstance(error, CostLimitReached) for error in errors)
    assert len(ledger) == len(answered) == len(server.bodies)
    assert client.meter.cost == pytest.approx(0.15 * len(answered))
    most = (len(str(server.bodies[0])) + 20) * 0.01
    assert 4.0 - most - 0.15 <= client.meter.cost <= 4.0
    assert re.search(r"another request could exceed max_cost 4 \(spent: US\$ \d\.\d{4}\)", str(errors[0]))
    ledger.close()


def test_interrupted_client_records_outstanding_answers(serve: Serve, tmp_path: Path) -> None:
    release = threading.Event()
    server = serve(lambda path, body: (release.wait(5), completion("paid"))[1])
    of = endpoint(server, max_in_flight=4)
    ledger = Ledger(tmp_path / "ledger.jsonl")

    async def run() -> None:
        async with EndpointClient(of, ledger, "try again") as client:
            waiting = asyncio.gather(*map(client.post, calls(of, 9)))
            while server.outstanding < 4:
                await asyncio.sleep(0.005)
            waiting.cancel()
            release.set()

    asyncio.run(run())
    assert len(ledger) == len(server.bodies) == 4
    ledger.close()


def test_background_client_sends_while_the_caller_continues(serve: Serve) -> None:
    release = threading.Event()
    server = serve(lambda path, body: (release.wait(5), completion(question(body)))[1])
    of = endpoint(server)
    client = BackgroundClient(of, None, "resume with --ckpt_path last")
    first, second = client.submit(calls(of, 3)), client.submit(calls(of, 5)[3:])
    assert not first.done()
    release.set()
    texts = [ChatAnswer.from_json(answer).text for answer in first.result(5) + second.result(5)]
    assert texts == ["0", "1", "2", "3", "4"] and client.meter.answers == 5
    client.close()
    client.close()


def test_background_client_raises_after_the_rest_is_recorded(serve: Serve, tmp_path: Path) -> None:
    def script(path: str, body: Any) -> Reply:
        if question(body) == "0":
            return Reply({"error": {"message": "died"}}, 500)
        time.sleep(0.1)
        return completion("a")

    of = endpoint(serve(script), max_attempts=1)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    client = BackgroundClient(of, ledger, "resume with --ckpt_path last")
    with pytest.raises(EndpointError, match=r"\(status 500: died\); resume with --ckpt_path last\.$"):
        client.submit(calls(of, 3)).result(5)
    client.close()
    assert len(ledger) == 2
    ledger.close()


def test_key_goes_to_its_endpoint_only(serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other-account")
    server = serve(lambda path, body: completion(f"you sent {KEY}"))
    ledger = Ledger(tmp_path / "ledger.jsonl")
    of = endpoint(server)
    post_all(of, ledger, calls(of, 1))
    ledger.close()
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert KEY.encode() not in (tmp_path / "ledger.jsonl").read_bytes() and KEY not in repr(of)
    server.key = None
    of = endpoint(server, api_key_variable=None)
    post_all(of, None, calls(of, 1))
    assert "sk-other-account" not in str(server.headers)
