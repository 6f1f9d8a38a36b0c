"""`rlmt distill` against loopback servers."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from loopback import KEY, Loopback, Reply, completion
from unreliable import (
    GOOD,
    REJECTED,
    UnreliableTeacher,
    arguments,
    check_result,
    files_with,
    read_lines,
    write_prompts,
)

from rlmt.cli.commands import main
from rlmt.data.demonstrations import load_demonstrations
from rlmt.distill.rows import check_answer
from rlmt.formats.thinking import FormatName, ThinkingFormat
from rlmt.types import Split, Status

Serve = Callable[[Callable[[str, Any], Reply]], Loopback]


def good(path: str, body: Any) -> Reply:
    return completion(GOOD.format(1, 1), prompt_tokens=100, completion_tokens=200)


@pytest.mark.parametrize(("reason", "answer"), REJECTED.items())
def test_answer_is_rejected_for_its_reason(reason: str, answer: tuple[str, str]) -> None:
    attempt = check_answer(completion(*answer).body)
    assert (attempt.reason, attempt.thought, attempt.response) == (reason, "", "")


def test_answer_without_choices_is_malformed() -> None:
    assert check_answer({"choices": []}).reason == "malformed"


PIECES = ["<think>", "</think>", "<response>", "</response>", "plan", "answer", " ", "\n", "\u200b", "\u2028", "\ud800"]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
@example("<think>plan</think>answer")
def test_every_format_can_write_an_accepted_answer(text: str) -> None:
    attempt = check_answer(completion(text).body)
    if attempt.reason:
        return
    assert attempt.thought and attempt.response
    for name in get_args(FormatName):
        form = ThinkingFormat(name)
        split = form.split(form.target(attempt.thought, attempt.response))
        assert split == Split(attempt.thought if form.thinks else "", attempt.response, Status.OK)


def test_unreliable_teacher_answers_every_prompt_once(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = UnreliableTeacher(hang=2.5)
    server = serve(teacher)
    out = tmp_path / "made" / "demos.jsonl"
    prompts = write_prompts(tmp_path / "prompts.jsonl", 220)
    assert main(arguments(server, prompts, out)) == 0
    check_result(out, 220)
    assert set(teacher.failed) == {"429", "500", "malformed", "dropped", "timeout"}
    keys = [row["key"] for row in read_lines(out.parent / "demos.ledger.jsonl")]
    # On a busy machine the client may give up on an answer that the server counts as delivered.
    assert 220 - 11 < len(set(keys)) == len(keys) <= teacher.delivered.total()
    printed = capsys.readouterr()
    assert "220 prompts to ask: about" in printed.out and "rejected: refused" in printed.out
    assert files_with(KEY, [tmp_path]) == [] and KEY not in printed.out + printed.err
    assert (out.parent / "demos.png").stat().st_size > 5000

    before = [path.read_bytes() for path in (out, out.with_name("demos.rejected.jsonl"))]
    seen = len(server.bodies)
    assert main(arguments(server, prompts, out)) == 0
    assert [path.read_bytes() for path in (out, out.with_name("demos.rejected.jsonl"))] == before
    assert {body["messages"][-1]["content"].split()[1] for body in server.bodies[seen:]} <= {
        str(i) for i in range(1, 220, 20)
    }  # refused requests are not answers


def test_both_arms_read_the_demonstrations(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(good)
    out = tmp_path / "[/x]" / "demos.jsonl"
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    rows = [{"messages": chat}, {"messages": chat}, {"messages": chat[1:]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(arguments(server, tmp_path / "prompts.jsonl", out)) == 0
    assert str(out) in capsys.readouterr().out.splitlines()
    for thinks in (True, False):
        turns = [turn for row in load_demonstrations(str(out), thinks) for turn in row.turns]
        assert [turn.context for turn in turns] == [chat, chat[1:]]  # the duplicate is asked once
        assert {(turn.thought, turn.response) for turn in turns} == {("A plan for 1.", "The answer to 1.")}
    (first, *_) = sorted(server.bodies, key=lambda body: -len(body["messages"]))
    assert first["messages"][0] == chat[0] and first["messages"][1]["content"].startswith("Hi\n\nAnswer the message")
    assert first["model"] == "gemini-2.5-flash" and first["reasoning_effort"] == "none"


def test_cost_limit_keeps_rows_and_a_higher_one_continues(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(good)
    out = tmp_path / "demos.jsonl"
    prompts = write_prompts(tmp_path / "prompts.jsonl", 12)
    prices = ["--teacher.input_price", "0", "--teacher.output_price", "1000", "--max_tokens", "300"]
    assert main(arguments(server, prompts, out, *prices, "--teacher.max_cost", "1.1")) == 2
    printed = capsys.readouterr()
    assert "another request could exceed max_cost 1.1 (spent: US$ 1.0000); raise max_cost" in printed.err
    assert "at most US$ 7.20" in printed.out
    assert len(read_lines(out)) == 5 and "not finished" in printed.out
    assert main(arguments(server, prompts, out, *prices, "--teacher.max_cost", "5")) == 0
    assert len(read_lines(out)) == len(server.bodies) == 12
    assert "7 prompts to ask" in (text := capsys.readouterr().out) and "spent so far: US$ 1.00" in text


@pytest.mark.parametrize(
    ("reply", "more", "message"),
    [
        (Reply({"error": {"message": "gone"}}, 503), ("--teacher.max_attempts", "2"), "no answer in 2 attempts"),
        (Reply({"error": {"message": "no such field"}}, 400), (), "--teacher: the first 10 requests were refused"),
        (completion("no tags"), (), "no answer was accepted; read"),
        (completion("x"), ("--instruction", "Think."), "--instruction does not mention <think> and </think>"),
        (completion("x"), ("--out", "x.csv"), "--out x.csv: the demonstrations are JSON lines"),
        (completion("x"), ("--teacher.api_key_variable", "UNSET_KEY"), "--teacher.api_key_variable: the environment"),
        (completion("x"), ("--teacher.base_url", ""), "--teacher.model gemini-2.5-flash is not a model folder"),
        (completion("x"), ("--limit", "0"), "--limit"),
    ],
)
def test_error_is_one_line(
    serve: Serve,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reply: Reply,
    more: tuple[str, ...],
    message: str,
) -> None:
    server = serve(lambda path, body: reply)
    prompts = write_prompts(tmp_path / "prompts.jsonl", 30)
    assert main(arguments(server, prompts, tmp_path / "demos.jsonl", *more)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error: ")]
    assert message in line and line.endswith(".") and KEY not in line


def test_foreign_output_file_is_kept(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demos.jsonl"
    out.write_text("mine\n")
    assert main(arguments(serve(good), write_prompts(tmp_path / "prompts.jsonl", 3), out)) == 2
    assert "was not written by `rlmt distill`" in capsys.readouterr().err and out.read_text() == "mine\n"


def test_without_terminal_yes_is_required(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(good)
    words = arguments(server, write_prompts(tmp_path / "prompts.jsonl", 3), tmp_path / "demos.jsonl")
    words.remove("--yes")
    assert main(words) == 2
    assert "--yes: there is no terminal to ask on" in capsys.readouterr().err and not server.bodies


def run_in_process(server: Loopback, words: list[str], kill_after: int | None) -> int | None:
    """Runs `rlmt` in a forked process, kills it after a number of requests, and returns its exit code."""
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(main(words)))
    process.start()
    until = len(server.bodies) + (kill_after or 0)
    while kill_after is not None and len(server.bodies) < until:
        assert process.exitcode is None
        time.sleep(0.002)
    if kill_after is not None:
        process.kill()
    process.join()
    return process.exitcode


def check_killed_runs(serve: Serve, tmp_path: Path, count: int, kills: list[int], hang: float) -> None:
    """Kills a run several times; no answer that reached the ledger is asked for again, and no row is twice."""
    teacher = UnreliableTeacher(hang)
    server = serve(teacher)
    out = tmp_path / "demos.jsonl"
    prompts = write_prompts(tmp_path / "prompts.jsonl", count)
    in_flight = 16
    more = ("--teacher.max_in_flight", str(in_flight), "--teacher.timeout", "15")  # a busy machine answers late
    words = arguments(server, prompts, out, *more)
    ledger = out.with_name("demos.ledger.jsonl")
    recorded = b""
    for kill in kills:
        assert run_in_process(server, words, kill) == -signal.SIGKILL
        assert not out.exists()
        data = ledger.read_bytes()
        assert data.startswith(recorded) and len(data) > len(recorded)
        recorded = data[: data.rfind(b"\n") + 1]
    assert run_in_process(server, words, None) == 0
    assert ledger.read_bytes().startswith(recorded)
    check_result(out, count)
    keys = [row["key"] for row in read_lines(ledger)]
    assert len(set(keys)) == len(keys)
    assert len(keys) <= teacher.delivered.total() <= len(keys) + len(kills) * in_flight
    assert files_with(KEY, [tmp_path]) == []


def test_killed_run_continues(serve: Serve, tmp_path: Path) -> None:
    check_killed_runs(serve, tmp_path, 120, [50], hang=0.0)


@pytest.mark.slow
def test_three_kills_of_two_thousand_prompts(serve: Serve, tmp_path: Path) -> None:
    check_killed_runs(serve, tmp_path, 2000, [300, 700, 600], hang=17.0)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also in a process that was started in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_records_outstanding_answers_and_writes_rows(
    serve: Serve, tmp_path: Path, interruptible: None
) -> None:
    def script(path: str, body: Any) -> Reply:
        number = int(body["messages"][-1]["content"].split()[1])
        if number >= 8:
            if len(server.bodies) == 12:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        return completion(GOOD.format(number, number))

    server = serve(script)
    out = tmp_path / "demos.jsonl"
    words = arguments(server, write_prompts(tmp_path / "prompts.jsonl", 40), out, "--teacher.max_in_flight", "4")
    assert main(words) == 130
    answered = len(server.bodies)
    assert 12 <= answered < 40
    assert len(read_lines(out.with_name("demos.ledger.jsonl"))) == len(read_lines(out)) == answered
