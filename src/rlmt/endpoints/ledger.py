"""A file that keeps every answer, so that no request is paid for twice."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rlmt.endpoints.calls import Call, Usage
from rlmt.errors import UserError

_FIELDS = {"key": str, "model": str, "answer": dict}
"""Fields of a record."""


class Ledger:
    """Answers by the key of their call: one JSON object per line, appended and flushed as they arrive.

    A line that a killed process left truncated is removed when the file is opened. Only one process at a time uses a
    file, by any of its threads; in a run of several ranks each rank has its own.

    Args:
        path: Path of the file; it is created with its folder if it does not exist.
        wait: Wait while another process uses the file.

    Raises:
        UserError: Another process uses the file, it cannot be written, or a line is not a record.
    """

    def __init__(self, path: Path, wait: bool = False) -> None:
        self.path = path
        self.usage: defaultdict[str, Usage] = defaultdict(Usage)
        """Billed tokens of all records by model."""
        self.counts: Counter[str] = Counter()
        """Number of records by model."""
        self._offsets: dict[str, int] = {}
        self._mutex = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another path.") from error
        try:
            self._lock(wait)
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def _lock(self, wait: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise UserError(
                    f"{self.path}: another process writes to it; wait until that one has ended, or use another path."
                ) from error
            print(f"{self.path}: waiting for another process that writes to it …", file=sys.stderr, flush=True)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be locked ({error.strerror}); choose a path on a file system with locks."
            ) from error

    def _read(self) -> None:
        """Indexes the records, and removes a truncated last line."""
        self._file.seek(0)
        self._end = 0
        for record, start, end in _records(self._file, self.path):
            self._index(record["key"], record["model"], record["answer"], start)
            self._end = end
        if self._file.seek(0, os.SEEK_END) > self._end:
            self._file.truncate(self._end)

    def _index(self, key: str, model: str, answer: dict[str, Any], offset: int) -> None:
        self._offsets[key] = offset
        self.counts[model] += 1
        self.usage[model] += Usage.from_json(answer)

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer to a call.

        Args:
            key: Key of the call.

        Returns:
            JSON of the answer, or None if it is not recorded.
        """
        if key not in self._offsets:
            return None
        with self._mutex:
            self._file.seek(self._offsets[key])
            line = self._file.readline()
        answer: dict[str, Any] = json.loads(line)["answer"]
        return answer

    def add(self, call: Call, answer: dict[str, Any], secret: str | None = None) -> None:
        """Appends an answer and hands it to the operating system, so that it survives the end of the process.

        Args:
            call: The call.
            answer: JSON of its answer.
            secret: API key, which is removed if the answer repeats it.

        Raises:
            UserError: The file cannot be written, for example because the disk is full.
        """
        model = str(call.body.get("model", ""))
        safe = _redact_strings(answer, secret)
        line = json.dumps({"key": call.key, "model": model, "answer": safe}).encode() + b"\n"
        with self._mutex:
            try:
                self._file.write(line)
                self._file.flush()
            except OSError as error:
                raise UserError(
                    f"{self.path}: cannot be written ({error.strerror}); make room, then run the same command again."
                ) from error
            self._index(call.key, model, answer, self._end)
            self._end += len(line)

    def close(self) -> None:
        """Closes the file and releases its lock."""
        self._file.close()


def recorded_usage(path: Path, model: str) -> Usage:
    """Billed tokens of a model in a ledger that another process may be writing.

    Args:
        path: Path of the file; one that does not exist has no records.
        model: Name of the model.

    Raises:
        UserError: A line is not a record.
    """
    if not path.exists():
        return Usage()
    with path.open("rb") as file:
        found = (Usage.from_json(record["answer"]) for record, *_ in _records(file, path) if record["model"] == model)
        return sum(found, Usage())


def _records(file: BinaryIO, path: Path) -> Iterator[tuple[dict[str, Any], int, int]]:
    """The records of a ledger with the offsets of their start and end, without a truncated last line."""
    end = 0
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
            if not all(isinstance(record[name], kind) for name, kind in _FIELDS.items()):
                raise TypeError("a field has another type")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: line {number} is not a record of an answer; remove the line, or use another path."
            ) from error
        start, end = end, end + len(line)
        yield record, start, end


def redact(text: str, secret: str | None) -> str:
    """The text without an API key."""
    return text.replace(secret, "***") if secret else text


def _redact_strings(value: Any, secret: str | None) -> Any:
    """JSON whose strings do not contain an API key; names of fields stay, since short keys occur in them."""
    if isinstance(value, str):
        return redact(value, secret)
    if isinstance(value, list):
        return [_redact_strings(part, secret) for part in value]
    if isinstance(value, dict):
        return {name: _redact_strings(part, secret) for name, part in value.items()}
    return value
