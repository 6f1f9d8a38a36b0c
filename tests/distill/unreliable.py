"""A teacher that fails in every way, and helpers to run `rlmt distill` against it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loopback import Loopback, Reply, completion

GOOD = "<think>\nA plan for {}.\n</think>\n\nThe answer to {}."

REJECTED = {
    "truncated": ("<think>\nA plan\n</think>\n\nThe ans", "length"),
    "finish_content_filter": ("", "content_filter"),
    "empty": ("", "stop"),
    "unclosed": ("<think>\nA plan that never ends.", "stop"),
    "unopened": ("A plan.\n</think>\n\nAn answer.", "stop"),
    "stray_tag": ("<think>a</think>b<think>c</think>", "stop"),
    "empty_response": ("<think>a plan</think>\n\n ", "stop"),
    "empty_thought": ("<think>\n</think>\n\nAn answer.", "stop"),
    "tag_inside": ("<think>I will write <response> here.</think>An answer.", "stop"),
    "not_text": ("<think>a</think>b\ud800", "stop"),
}
"""Reason → text and finish reason of an answer that is rejected for it."""


class UnreliableTeacher:
    """Answers prompts "prompt N …" by their number; a fraction of the requests fails first.

    Number mod 20 = 0 is never answered well, 1 is refused, 2 to 4 are answered well at the second answer; others are
    answered well. About one request in eight meets status 429 or 500, a timeout, a lost connection or text that is not
    JSON.
    """

    def __init__(self, hang: float = 0.0) -> None:
        self.delivered: Counter[tuple[int, int]] = Counter()
        """(Prompt, number of the answer) → answers sent."""
        self.failed: Counter[str] = Counter()
        self.hang = hang
        self.lock = threading.Lock()
        self.arrived = 0

    def __call__(self, path: str, body: Any) -> Reply:
        number = int(re.match(r"prompt (\d+)", body["messages"][-1]["content"])[1])  # type: ignore[index]
        with self.lock:
            self.arrived += 1
            draw = int(hashlib.sha256(f"{self.arrived}".encode()).hexdigest(), 16) % 200
        failures = {
            "429": Reply({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.01"}),
            "500": Reply({"error": {"message": "out of order"}}, 500),
            "malformed": Reply(b'{"choices": [{"mes'),
            "dropped": Reply(drop=True),
            "timeout": Reply({"error": {"message": "late"}}, 503),
        }
        kind = list(failures)[draw // 5] if draw < 5 * len(failures) else ""
        if kind == "timeout" and self.failed[kind] >= 6:  # enough: each one takes seconds
            kind = ""
        if kind:
            with self.lock:
                self.failed[kind] += 1
            if kind == "timeout":
                time.sleep(self.hang)
            return failures[kind]
        if number % 20 == 1:
            return Reply({"error": {"message": "content policy"}}, 400)
        with self.lock:
            try_ = self.delivered[number, 0] > 0 and number % 20 in (0, 2, 3, 4)
            self.delivered[number, int(try_)] += 1
        if number % 20 == 0 or (number % 20 in (2, 3, 4) and not try_):
            text, finish = list(REJECTED.values())[number // 20 % len(REJECTED)]
            return completion(text, finish)
        return completion(GOOD.format(number, number))


def write_prompts(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"prompt {i} ?"}) + "\n" for i in range(count)))
    return path


def arguments(server: Loopback, prompts: Path, out: Path, *more: str) -> list[str]:
    return [
        *("distill", "--config", "distill", "--prompts", str(prompts), "--out", str(out), "--yes"),
        *("--teacher.base_url", f"{server.url}/v1", "--teacher.api_key_variable", "PLANTED_KEY"),
        *("--teacher.timeout", "2", *more),
    ]


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_result(out: Path, count: int) -> None:
    """Every prompt is accepted or rejected once, with the reason that the teacher's answer gives."""
    accepted, rejected = read_lines(out), read_lines(out.with_name(f"{out.stem}.rejected.jsonl"))
    bad = [i for i in range(count) if i % 20 in (0, 1)]
    assert [row["index"] for row in rejected] == bad
    assert [row["index"] for row in accepted] == [i for i in range(count) if i not in bad]
    for row in accepted:
        i = row["index"]
        assert row["prompt"] == [{"role": "user", "content": f"prompt {i} ?"}]
        assert (row["thought"], row["response"]) == (f"A plan for {i}.", f"The answer to {i}.")
    for row in rejected:
        i = row["index"]
        expected = "refused" if i % 20 else list(REJECTED)[i // 20 % len(REJECTED)]
        assert row["reason"] == expected and len(row["attempts"]) == (1 if i % 20 else 2)


def files_with(secret: str, folders: Iterable[Path]) -> list[Path]:
    """Files that contain a text."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if secret.encode() in path.read_bytes()]
