"""A judge is asked every question once; answers that cannot be read are asked for again, and counted as empty."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from loopback import KEY, Loopback, Reply, completion

from rlmt.endpoints import Endpoint
from rlmt.errors import UserError
from rlmt.evaluation.benchmark import Question
from rlmt.evaluation.judging import Verdicts, ask_judge

Serve = Callable[[Callable[[str, Any], Reply]], Loopback]


def question(text: str, max_tokens: int = 16) -> Question:
    return Question([{"role": "user", "content": text}], max_tokens)


def endpoint(server: Loopback, **options: Any) -> Endpoint:
    return Endpoint(server.url, "judge-1", "PLANTED_KEY", **options)


def ask(server: Loopback, texts: list[str], ledger: Path, **options: Any) -> Verdicts:
    cases = [[question(f"{text} first"), question(f"{text} second")] for text in texts]
    options = {"yes": True, "readable": lambda i, answers: all(a.startswith("ok") for a in answers)} | options
    return ask_judge(endpoint(server), cases, ledger, **options)


def test_answers_are_in_order_and_asked_once_over_restarts(serve: Serve, tmp_path: Path) -> None:
    lost = {"on": True}

    def script(path: str, body: Any) -> Reply:
        text = body["messages"][0]["content"]
        if lost["on"] and text == "c second":
            return Reply({"error": {"message": "gone"}}, 404)
        reply = completion(f"ok {text}")
        reply.body["model"] = "judge-1-2026-01-01"
        return reply

    server = serve(script)
    with pytest.raises(UserError, match="gone"):
        ask(server, ["a", "b", "c"], tmp_path / "ledger.jsonl")
    lost["on"] = False
    verdicts = ask(server, ["a", "b", "c"], tmp_path / "ledger.jsonl")
    assert verdicts.answers == [[f"ok {t} first", f"ok {t} second"] for t in "abc"]
    assert verdicts.versions == ("judge-1-2026-01-01",)
    counts = Counter(body["messages"][0]["content"] for body in server.bodies)
    del counts["c second"]  # answered with an error first
    assert set(counts.values()) == {1} and len(counts) == 5
    asked = len(server.bodies)
    assert ask(server, ["c", "a"], tmp_path / "ledger.jsonl").answers[1] == ["ok a first", "ok a second"]
    assert len(server.bodies) == asked


def test_unreadable_case_is_asked_again_and_a_truncated_answer_is_empty(serve: Serve, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    def script(path: str, body: Any) -> Reply:
        text = body["messages"][0]["content"]
        seen[text] += 1
        if text.startswith("b") and seen[text] == 1:
            return completion("what?")
        return completion("ok", "length" if text.startswith("c") else "stop")

    server = serve(script)
    verdicts = ask(server, ["a", "b", "c"], tmp_path / "l.jsonl")
    assert verdicts.answers == [["ok", "ok"], ["ok", "ok"], ["", ""]]
    assert seen == {f"{text} {n}": k for text, k in zip("abc", (1, 2, 3), strict=True) for n in ("first", "second")}
    temperatures = {body["temperature"] for body in server.bodies if body["messages"][0]["content"] == "b first"}
    assert temperatures == {0.0, 0.7}
    assert ask(server, ["c"], tmp_path / "l.jsonl", truncated=True).answers == [["ok", "ok"]]


def test_refused_question_is_empty_and_not_repeated(serve: Serve, tmp_path: Path) -> None:
    def script(path: str, body: Any) -> Reply:
        long = body["messages"][0]["content"] == "b second"
        return Reply({"error": {"message": "too long"}}, 400) if long else completion("ok")

    server = serve(script)
    assert ask(server, ["a", "b"], tmp_path / "l.jsonl").answers == [["ok", "ok"], ["ok", ""]]
    assert len(server.bodies) == 4


def test_judge_that_cannot_be_read_at_all_is_an_error(serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda path, body: completion("banana"))
    with pytest.raises(UserError, match="none of 8 answers of judge-1 can be read, one ends with 'banana'"):
        ask(server, list("abcdefgh"), tmp_path / "l.jsonl", attempts=1)


def test_field_that_every_request_has_wrong_stops_after_ten(serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda path, body: Reply({"error": {"message": "unknown field"}}, 400))
    with pytest.raises(UserError, match="the first 10 requests were refused"):
        ask(server, [f"{i}" for i in range(200)], tmp_path / "l.jsonl")
    assert len(server.bodies) < 200


def test_two_runs_with_one_ledger_ask_every_question_once(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second_waits = threading.Event()

    def script(path: str, body: Any) -> Reply:
        assert second_waits.wait(60)
        return completion("ok")

    server = serve(script)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(ask, server, ["a", "b"], tmp_path / "l.jsonl", show=False) for _ in range(2)]
        printed = ""
        while "waiting for another process" not in printed:
            assert not any(run.done() for run in runs)
            printed += capsys.readouterr().err
        second_waits.set()
        assert [run.result().answers for run in runs] == [[["ok", "ok"], ["ok", "ok"]]] * 2
    assert len(server.bodies) == 4


def refuse(*texts: str) -> Callable[[str, Any], Reply]:
    """Refuses questions that start with one of the texts."""

    def script(path: str, body: Any) -> Reply:
        if body["messages"][0]["content"].startswith(texts):
            return Reply({"error": {"message": "unknown field"}}, 400)
        return completion("ok")

    return script


def test_few_questions_that_are_all_refused_are_an_error(serve: Serve, tmp_path: Path) -> None:
    server = serve(refuse("a"))
    with pytest.raises(UserError) as caught:
        ask(server, ["a"], tmp_path / "l.jsonl")
    assert str(caught.value).startswith(f"--judge: all 2 requests were refused: {server.url}: the request was refused")
    assert "unknown field" in str(caught.value) and (tmp_path / "l.jsonl").read_text() == ""


def test_resumed_run_whose_rest_is_refused_is_an_error_and_keeps_its_answers(serve: Serve, tmp_path: Path) -> None:
    server, path = serve(refuse("b", "c")), tmp_path / "l.jsonl"
    ask(server, ["a"], path)
    recorded = path.read_text()
    with pytest.raises(UserError, match="all 4 requests were refused"):
        ask(server, ["a", "b", "c"], path)
    assert path.read_text() == recorded and recorded.count("\n") == 2
    server.script = refuse()
    assert ask(server, ["a", "b", "c"], path).answers == [["ok", "ok"]] * 3
    assert len(server.bodies) == 2 + 4 + 4


def test_finished_run_with_a_refused_question_can_be_repeated(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(refuse("c"))
    for _ in range(2):
        assert ask(server, ["a", "b", "c"], tmp_path / "l.jsonl").answers == [["ok", "ok"], ["ok", "ok"], ["", ""]]
        error = capsys.readouterr().err
        assert f"--judge: 2 of 6 questions were refused and have no answer: {server.url}: the request was" in error


def test_cost_is_estimated_and_asked_for_before_anything_is_sent(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(lambda path, body: completion("ok"))
    judge = endpoint(server, input_price=1.0, output_price=1.0)
    with pytest.raises(UserError, match="--yes"):
        ask_judge(judge, [[question("x" * 4000, 100)]], tmp_path / "l.jsonl", lambda i, a: True)
    assert "1 questions to ask: about 1,000 prompt tokens and 100 completion tokens" in capsys.readouterr().out
    renamed = endpoint(server, options={"max_tokens": None, "max_completion_tokens": 70})
    with pytest.raises(UserError, match="--yes"):
        ask_judge(renamed, [[question("x" * 4000, 100)]], tmp_path / "l.jsonl", lambda i, a: True)
    assert "about 1,000 prompt tokens and 70 completion tokens" in capsys.readouterr().out
    assert server.bodies == []


def test_missing_key_is_one_line_and_not_needed_for_recorded_answers(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(lambda path, body: completion("ok"))
    ask(server, ["a"], tmp_path / "l.jsonl")
    monkeypatch.delenv("PLANTED_KEY")
    assert ask(server, ["a"], tmp_path / "l.jsonl").answers == [["ok", "ok"]]
    with pytest.raises(UserError, match="PLANTED_KEY is not set"):
        ask(server, ["b"], tmp_path / "l.jsonl")
    assert KEY not in (tmp_path / "l.jsonl").read_text()
