"""Completions on disk: a folder of parquet files, one written as soon as its completions exist, and their settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlmt.checkpointing.files import atomic_write, remove_unfinished
from rlmt.errors import UserError, first_line
from rlmt.evaluation.benchmark import Item
from rlmt.types import Message, Status

SETTINGS = "_settings.json"
"""Readers of parquet folders ignore names that start with an underscore."""

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("thought", pa.string()),
        ("response", pa.string()),
        ("status", pa.string()),
        ("finish", pa.string()),
        ("thought_tokens", pa.int64()),
        ("response_tokens", pa.int64()),
    ]
)
"""`prompt` is a hash of the conversation."""


@dataclass(frozen=True)
class Completion:
    """A model's answer to one item, split by its thinking format."""

    id: str
    """Id of the item."""
    thought: str
    """The thought, without its tags."""
    response: str
    """The response; empty unless the status is OK."""
    status: Status
    """Whether the completion is well formed, or why not."""
    finish: str
    """`stop`, `length` (truncated), `prompt_too_long` (nothing was generated), `refused`, or another of an endpoint."""
    thought_tokens: int | None
    """Tokens up to and including the close tag; None if an endpoint does not report them."""
    response_tokens: int | None
    """Tokens after the thought; None if an endpoint does not report them."""

    @property
    def ok(self) -> bool:
        """Whether the completion is well formed."""
        return self.status is Status.OK


class CompletionStore:
    """The completions of one model for one set of items.

    Args:
        path: Folder; it is created by the first completions.
        identity: What completions depend on besides their prompt; JSON values.
        notes: Further facts about them, such as versions of packages; JSON values.

    Raises:
        UserError: The folder holds completions with another identity.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        self.path, self._identity, self._notes = path, dict(identity), dict(notes)
        remove_unfinished(path)
        if (path / SETTINGS).is_file():
            _check_identity(path, read_settings(path), self._identity)
        self._prompts, self._parts = _read_prompts(path)

    def missing(self, items: Sequence[Item]) -> list[Item]:
        """The items without a completion.

        Raises:
            UserError: An item has a completion to another prompt.
        """
        for item in items:
            if self._prompts.get(item.id, prompt_hash(item)) != prompt_hash(item):
                raise UserError(
                    f"{self.path}: item {item.id} was generated for another prompt (the data has changed); give "
                    "another --out, or remove this folder."
                )
        return [item for item in items if item.id not in self._prompts]

    def add(self, items: Sequence[Item], completions: Sequence[Completion]) -> None:
        """Writes completions as one file, which appears when it is complete.

        Args:
            items: Items.
            completions: Their completions.
        """
        if not (self.path / SETTINGS).is_file():
            with atomic_write(self.path / SETTINGS) as file:
                file.write_text(json.dumps(self._identity | self._notes, indent=2) + "\n", encoding="utf-8")
        rows = [
            asdict(completion) | {"prompt": prompt_hash(item)}
            for item, completion in zip(items, completions, strict=True)
        ]
        with atomic_write(self.path / f"part-{self._parts:05d}.parquet") as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), file, compression="zstd")
        self._parts += 1
        self._prompts |= {item.id: prompt_hash(item) for item in items}


def read_completions(path: Path, items: Sequence[Item]) -> list[Completion]:
    """Reads the completions of items, in their order.

    Args:
        path: Folder of a `CompletionStore`.
        items: Items.

    Raises:
        UserError: There are none, some are missing, or one belongs to another prompt.
    """
    rows = {row["id"]: row for row in _read_rows(path, _SCHEMA.names)}
    found = [row for item in items if (row := rows.get(item.id)) and row["prompt"] == prompt_hash(item)]
    if len(found) < len(items):
        raise UserError(
            f"{path}: has completions for {len(found):,} of {len(items):,} items; generate them with the same command "
            "without --judge_only."
        )
    return [
        Completion(
            **{name: row[name] for name in row if name not in ("prompt", "status")}, status=Status(row["status"])
        )
        for row in found
    ]


def read_settings(path: Path) -> dict[str, Any]:
    """Reads what the completions of a folder were generated with.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        settings: dict[str, Any] = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path / SETTINGS}: cannot be read ({first_line(error)}); generate the completions."
        ) from error
    return settings


def prompt_hash(item: Item) -> str:
    """A hash of an item's conversation."""
    return conversation_hash(item.messages)


def conversation_hash(messages: Sequence[Message]) -> str:
    """A hash of roles and texts."""
    turns = [[turn["role"], turn["content"]] for turn in messages]
    return blake2b(json.dumps(turns).encode(), digest_size=16).hexdigest()


def _check_identity(path: Path, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    for key, value in json.loads(json.dumps(identity)).items():
        if found.get(key) != value:
            what = "another model" if key == "fingerprint" else f"{key} {found.get(key)}, not {value}"
            raise UserError(
                f"{path}: was generated with {what}; give another --out or model name, or remove the folder."
            )


def _read_prompts(path: Path) -> tuple[dict[str, str], int]:
    """The hash of each completed item's prompt by its id, and the number of the next file."""
    rows = _read_rows(path, ["id", "prompt"])
    numbers = [int(file.stem.rpartition("-")[2]) for file in path.glob("part-*.parquet")]  # a damaged one was removed
    return {row["id"]: row["prompt"] for row in rows}, max(numbers, default=-1) + 1


def _read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for file in sorted(path.glob("part-*.parquet")):
        try:
            rows += pq.read_table(file, columns=list(columns), schema=_SCHEMA).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: cannot be read ({first_line(error)}); remove it, and generate again.") from error
    return rows
