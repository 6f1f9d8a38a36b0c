"""Reads prompt sets: parquet, jsonl, json and csv files, or a data set on the Hugging Face hub.

One column holds the prompts: `prompt` (text or a list of messages), else `messages`. A prompt is a conversation in
which user and assistant take turns, with an optional system turn first; it ends with a user's turn, because the policy
writes the next one. A row that ends with an assistant's turn (preference and SFT data) is an error and not silently
cut: its last turn may be a target that the user did not mean to throw away. Other columns are not read.

Every bad row is reported with its file and row number before any model is loaded. Text is kept as it is, control
characters included; only lone surrogates are refused, because no tokenizer can encode them.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TextIO

from torch.utils.data import Dataset

from rlmt.errors import UserError
from rlmt.types import Message, Prompt

DEFAULT_COLUMNS = ("prompt", "messages")
"""Columns looked for, in this order, when none is named."""

SHOWN_BAD_ROWS = 3
"""How many bad rows an error spells out."""

_Cells = list[tuple[str, object]]
"""What a reader returns: each row's place in the file ("row 3") and its cell in the prompt column."""


class PromptDataset(Dataset[Prompt]):
    """A map-style data set over prompts held in memory.

    Args:
        prompts: the prompts, in any order.
    """

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = list(prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, position: int) -> Prompt:
        return self.prompts[position]

    @property
    def keys(self) -> list[int]:
        """Row number of each prompt, the identity that orders and seeds depend on."""
        return [prompt.index for prompt in self.prompts]

    def fingerprint(self) -> str:
        """A digest of all rows: equal for equal prompts in equal order, on every machine."""
        digest = blake2b(digest_size=16)
        for prompt in self.prompts:
            digest.update(json.dumps([prompt.index, prompt.messages]).encode())
        return digest.hexdigest()


def load_prompts(source: str, column: str | None = None, system: str | None = None) -> list[Prompt]:
    """Reads all prompts of a file or a hub data set.

    A source is a file if it exists, has one of the known suffixes (.parquet, .jsonl, .json, .csv) or is written like a
    path; anything else is the name of a hub data set, whose `train` split is read.

    Args:
        source: path or hub name.
        column: the column that holds the prompts; None takes `prompt`, else `messages`.
        system: system prompt for rows that have none.

    Returns:
        The prompts in the order of the rows, `index` counting from 0.

    Raises:
        UserError: the source cannot be read, lacks the column, is empty, or holds bad rows.
    """
    if system is not None and (problem := _text_problem(system)):
        raise UserError(f"--data.system {problem}: leave it out or give it text")
    column, cells = _read_file(source, column) if _is_file(source) else _read_hub(source, column)
    if not cells:
        raise UserError(f"{source} holds no prompts: give a file with at least one row")
    prompts: list[Prompt] = []
    bad: list[str] = []
    for index, (place, cell) in enumerate(cells):
        try:
            prompts.append(Prompt(index, _to_messages(cell, column, system)))
        except ValueError as error:
            bad.append(f"{place}: {error}")
    if bad:
        more = f"; and {len(bad) - SHOWN_BAD_ROWS:,} more bad rows" if len(bad) > SHOWN_BAD_ROWS else ""
        raise UserError(f"{source}: {'; '.join(bad[:SHOWN_BAD_ROWS])}{more}: mend or remove them")
    return prompts


def _to_messages(cell: object, column: str, system: str | None) -> list[Message]:
    """Turns one cell into a conversation; ValueError says in a few words what is wrong with it."""
    if isinstance(cell, str) and column != "messages":
        if problem := _text_problem(cell):
            raise ValueError(f"`{column}` {problem}")
        messages = [Message(role="user", content=cell)]
    elif isinstance(cell, list):
        messages = [_to_message(turn, number) for number, turn in enumerate(cell, start=1)]
    else:
        wanted = "a list of messages" if column == "messages" else "text or a list of messages"
        raise ValueError(f"`{column}` is {_kind(cell)}, not {wanted}")
    has_system = bool(messages) and messages[0]["role"] == "system"
    turns = messages[has_system:]
    if not turns:
        raise ValueError("no user turn")
    for number, turn in enumerate(turns, start=1 + has_system):
        expected = "user" if (number - has_system) % 2 else "assistant"
        if turn["role"] != expected:
            raise ValueError(f"turn {number} has role {turn['role']!r} where {expected!r} must stand")
    if turns[-1]["role"] != "user":
        raise ValueError("ends with an assistant's turn where a prompt ends with a user's")
    if system is not None and not has_system:
        messages.insert(0, Message(role="system", content=system))
    return messages


def _to_message(turn: object, number: int) -> Message:
    if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
        raise ValueError(f"turn {number} is not a message with `role` and `content`")
    if problem := _text_problem(turn["content"]):
        raise ValueError(f"turn {number} {problem}")
    return Message(role=str(turn["role"]), content=turn["content"])


def _text_problem(text: object) -> str:
    """What keeps a text from being a turn, or "" if nothing does."""
    if not isinstance(text, str):
        return f"is {_kind(text)}, not text"
    if not text.strip():
        return "is empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds a lone surrogate, which no tokenizer can encode"
    return ""


def _kind(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def _is_file(source: str) -> bool:
    path = Path(source).expanduser()
    path_like = source.startswith((".", "/", "~")) or source.count("/") > 1  # hub names are "name" or "owner/name"
    return path_like or path.suffix.lower() in _READERS or path.exists()


def _read_file(source: str, column: str | None) -> tuple[str, _Cells]:
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"{source} does not exist: check the path")
    if path.is_dir():
        raise UserError(f"{source} is a folder: name a file in it")
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{source} has an unknown extension {path.suffix!r}: use one of {', '.join(_READERS)}")
    try:
        return _READERS[path.suffix.lower()](path, column)
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text (byte {error.start}): convert it to UTF-8") from error
    except OSError as error:
        raise UserError(f"{source} cannot be read: {_one_line(error)}") from error


def _pick_column(found: Sequence[str], column: str | None, source: str) -> str:
    for name in (column,) if column is not None else DEFAULT_COLUMNS:
        if name in found:
            return name
    wanted = repr(column) if column is not None else " or ".join(map(repr, DEFAULT_COLUMNS))
    columns = ", ".join(map(repr, found))
    raise UserError(f"{source} has no column {wanted}, only {columns}: rename one, or set --data.column")


def _read_parquet(path: Path, column: str | None) -> tuple[str, _Cells]:
    import pyarrow
    import pyarrow.parquet

    try:
        column = _pick_column(pyarrow.parquet.read_schema(path).names, column, str(path))
        cells = pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file: {_one_line(error)}") from error
    return column, [(f"row {number}", cell) for number, cell in enumerate(cells, start=1)]


def _read_jsonl(path: Path, column: str | None) -> tuple[str, _Cells]:
    rows: list[tuple[str, object]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    rows.append((f"line {number}", json.loads(line)))
                except ValueError as error:
                    raise UserError(f"{path}: line {number} is not JSON: {_one_line(error)}") from error
    return _cells_of_objects(rows, column, path)


def _read_json(path: Path, column: str | None) -> tuple[str, _Cells]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {_one_line(error)}; one object a line is .jsonl") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} holds no list: a .json file is a list of objects, one a prompt")
    return _cells_of_objects([(f"row {number}", row) for number, row in enumerate(rows, start=1)], column, path)


def _cells_of_objects(rows: list[tuple[str, object]], column: str | None, path: Path) -> tuple[str, _Cells]:
    """Takes the prompt column out of JSON rows; the first row says which columns there are."""
    objects: list[tuple[str, dict[str, object]]] = []
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f'{path}: {place} is {_kind(row)}, not an object: write {{"prompt": ...}}')
        objects.append((place, row))
    column = _pick_column(list(objects[0][1]), column, str(path)) if objects else ""
    return column, [(place, row.get(column)) for place, row in objects]


def _read_csv(path: Path, column: str | None) -> tuple[str, _Cells]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        # csv refuses fields beyond 128 KiB by default; the limit is global, so it is put back.
        limit = csv.field_size_limit(sys.maxsize)
        try:
            return _read_csv_rows(file, path, column)
        finally:
            csv.field_size_limit(limit)


def _read_csv_rows(file: TextIO, path: Path, column: str | None) -> tuple[str, _Cells]:
    reader = csv.DictReader(file, strict=True)
    cells: _Cells = []
    try:
        if reader.fieldnames is None:
            return "", cells
        column = _pick_column(reader.fieldnames, column, str(path))
        for number, row in enumerate(reader, start=1):
            if None in row:  # an unquoted comma in a prompt would otherwise cut it short unseen
                raise UserError(f"{path}: row {number} has more fields than the header: quote fields that hold commas")
            cells.append((f"row {number}", row[column]))
    except csv.Error as error:
        raise UserError(f"{path}: row {len(cells) + 1} is not CSV: {_one_line(error)}") from error
    return column or "", cells


def _read_hub(name: str, column: str | None) -> tuple[str, _Cells]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub client raises errors of many libraries; all mean the same to the user
        raise UserError(
            f"{name} is no file, and as a hub data set it cannot be loaded: {_one_line(error)}: check the "
            "name and the network, or give a file"
        ) from error
    column = _pick_column(rows.column_names, column, name)
    return column, [(f"row {number}", cell) for number, cell in enumerate(rows[column], start=1)]


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_READERS: dict[str, Callable[[Path, str | None], tuple[str, _Cells]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
}
