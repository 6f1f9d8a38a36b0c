"""The ledger file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlmt.endpoints import Call, Ledger, Usage
from rlmt.endpoints.ledger import recorded_usage
from rlmt.errors import UserError

CALLS = [Call("/a", {"model": "m", "n": n}) for n in range(3)]
ANSWERS = [{"text": f"line\u2028separator \ud800 {n}", "usage": {"prompt_tokens": n}} for n in range(3)]


def filled(path: Path) -> Path:
    ledger = Ledger(path)
    for call, answer in zip(CALLS, ANSWERS, strict=True):
        ledger.add(call, answer)
        assert ledger.get(call.key) == answer
    ledger.close()
    return path


def test_truncated_last_line_is_cut_at_every_byte(tmp_path: Path) -> None:
    data = filled(tmp_path / "folder" / "ledger.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    path = tmp_path / "cut.jsonl"
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        ledger = Ledger(path)
        complete = sum(end <= size for end in ends)
        assert len(ledger) == complete and ledger.usage["m"] == Usage(sum(range(complete)), 0)
        assert path.stat().st_size == (ends[complete - 1] if complete else 0)
        ledger.close()
    path.write_bytes(data[: ends[1] + 5])
    ledger = Ledger(path)
    ledger.add(CALLS[2], ANSWERS[2])
    ledger.close()
    assert path.read_bytes() == data


def test_usage_is_read_while_another_process_writes(tmp_path: Path) -> None:
    assert recorded_usage(tmp_path / "ledger.jsonl", "m") == Usage()
    ledger = Ledger(filled(tmp_path / "ledger.jsonl"))
    ledger.add(Call("/a", {"model": "other"}), {"usage": {"prompt_tokens": 7}})
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"key": "trunc')
    assert recorded_usage(tmp_path / "ledger.jsonl", "m") == Usage(0 + 1 + 2, 0)
    assert recorded_usage(tmp_path / "ledger.jsonl", "other") == Usage(7, 0)
    ledger.close()


def test_second_process_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(UserError, match=r"ledger\.jsonl: another process writes to it; wait"):
        Ledger(tmp_path / "ledger.jsonl")
    ledger.close()
    Ledger(tmp_path / "ledger.jsonl").close()


def test_ledger_that_waits_has_the_answers_of_the_process_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ledger.jsonl"
    first = Ledger(path)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(Ledger, path, wait=True)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.2)
        assert f"{path}: waiting for another process that writes to it" in capsys.readouterr().err
        first.add(CALLS[1], ANSWERS[1])
        first.close()
        ledger = second.result(timeout=60)
    assert len(ledger) == 1 and CALLS[1].key in ledger
    ledger.add(CALLS[2], ANSWERS[2])
    assert ledger.get(CALLS[1].key) == ANSWERS[1] and ledger.get(CALLS[2].key) == ANSWERS[2]
    ledger.close()


@pytest.mark.parametrize("secret", ["key", "token", "answer", 'quote"\\', "schlüssel", "1"])
def test_key_is_removed_from_strings_of_the_answer_alone(tmp_path: Path, secret: str) -> None:
    call = Call("/a", {"model": "m"})
    answer = {"choices": [{"text": f"has {secret}", "n": [f"{secret}!", None, 1.0]}], "usage": {"prompt_tokens": 11}}
    for _ in range(2):  # as written, and as read again
        ledger = Ledger(tmp_path / "ledger.jsonl")
        if call.key not in ledger:
            ledger.add(call, answer, secret)
        assert ledger.usage["m"] == Usage(11, 0)
        assert ledger.get(call.key) == answer | {"choices": [{"text": "has ***", "n": ["***!", None, 1.0]}]}
        ledger.close()


@pytest.mark.parametrize("line", ["{}", "[]", "3", "not JSON", json.dumps({"key": "k", "model": "m", "answer": 3})])
def test_foreign_line_is_refused_and_file_kept(tmp_path: Path, line: str) -> None:
    path = filled(tmp_path / "ledger.jsonl")
    path.write_text(path.read_text() + line + "\n")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"ledger\.jsonl: line 4 is not a record of an answer"):
        Ledger(path)
    assert path.read_bytes() == before


@pytest.fixture
def switch_often() -> Iterator[None]:
    """Python switches between threads as often as it can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_share_a_ledger(tmp_path: Path, switch_often: None) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    calls = [Call("/a", {"model": "m", "n": n}) for n in range(400)]

    def write(thread: int) -> None:
        for call in calls[thread::4]:
            ledger.add(call, {"text": "x" * (call.body["n"] * 20), "n": call.body["n"]})
            assert (ledger.get(call.key) or {})["n"] == call.body["n"]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    ledger.close()
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert [(ledger.get(call.key) or {})["n"] for call in calls] == list(range(400))
    ledger.close()
