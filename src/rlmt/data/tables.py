"""Reads the rows of a data set: a parquet, jsonl, json or csv file, or a data set on the Hugging Face hub.

Only the columns asked for are read. Every bad row is reported with its file and row number.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

from rlmt.data.messages import type_name
from rlmt.errors import UserError

SHOWN_BAD_ROWS = 3
"""How many bad rows an error spells out."""

Cells = dict[str, object]
"""A row's cells by column; None where it has none."""
Rows = list[tuple[str, Cells]]
"""Each row's place in the file ("row 3") and its cells."""
Choose = Callable[[Sequence[str]], Sequence[str]]
"""Takes the columns that a source has and gives those to read; raises UserError where they do not do."""

T = TypeVar("T")


def read_table(source: str, choose: Choose, what: str) -> Rows:
    """Reads the chosen columns of all rows of a file or a hub data set.

    A source is a file if it exists, has one of the known suffixes (.parquet, .jsonl, .json, .csv) or is written like a
    path; anything else is the name of a hub data set, whose `train` split is read. The columns of a JSON file are the
    keys of all its rows.

    Args:
        source: path or hub name.
        choose: picks the columns.
        what: what the rows are, in the plural, for messages.

    Returns:
        The rows, at least one.

    Raises:
        UserError: the source cannot be read or is empty, or what `choose` raises.
    """
    rows = _read_file(source, choose) if _is_file(source) else _read_hub(source, choose)
    if not rows:
        raise UserError(f"{source} holds no {what}: give a file with at least one row")
    return rows


def parse_rows(source: str, rows: Rows, parse: Callable[[int, Cells], T]) -> list[T]:
    """Makes something of every row.

    Args:
        source: where they are from.
        rows: the rows.
        parse: takes a row's number, from 0, and its cells; raises ValueError with a few words on what is wrong.

    Raises:
        UserError: there are bad rows; the first ones are named.
    """
    parsed: list[T] = []
    bad: list[str] = []
    for index, (place, cells) in enumerate(rows):
        try:
            parsed.append(parse(index, cells))
        except ValueError as error:
            bad.append(f"{place}: {error}")
    if bad:
        more = f"; and {len(bad) - SHOWN_BAD_ROWS:,} more bad rows" if len(bad) > SHOWN_BAD_ROWS else ""
        raise UserError(f"{source}: {'; '.join(bad[:SHOWN_BAD_ROWS])}{more}: mend or remove them")
    return parsed


def _is_file(source: str) -> bool:
    path = Path(source).expanduser()
    path_like = source.startswith((".", "/", "~")) or source.count("/") > 1  # hub names are "name" or "owner/name"
    return path_like or path.suffix.lower() in _READERS or path.exists()


def _read_file(source: str, choose: Choose) -> Rows:
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"{source} does not exist: check the path")
    if path.is_dir():
        raise UserError(f"{source} is a folder: name a file in it")
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{source} has an unknown extension {path.suffix!r}: use one of {', '.join(_READERS)}")
    try:
        return _READERS[path.suffix.lower()](path, choose)
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text (byte {error.start}): convert it to UTF-8") from error
    except OSError as error:
        raise UserError(f"{source} cannot be read: {_one_line(error)}") from error


def _read_parquet(path: Path, choose: Choose) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = list(choose(pyarrow.parquet.read_schema(path).names))
        rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file: {_one_line(error)}") from error
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]


def _read_jsonl(path: Path, choose: Choose) -> Rows:
    rows: list[tuple[str, object]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    rows.append((f"line {number}", json.loads(line)))
                except ValueError as error:
                    raise UserError(f"{path}: line {number} is not JSON: {_one_line(error)}") from error
    return _rows_of_objects(rows, choose, path)


def _read_json(path: Path, choose: Choose) -> Rows:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {_one_line(error)}; one object a line is .jsonl") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} holds no list: a .json file is a list of objects, one a row")
    return _rows_of_objects([(f"row {number}", row) for number, row in enumerate(rows, start=1)], choose, path)


def _rows_of_objects(rows: list[tuple[str, object]], choose: Choose, path: Path) -> Rows:
    objects: list[tuple[str, dict[str, object]]] = []
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{path}: {place} is {type_name(row)}, not an object of columns and values")
        objects.append((place, row))
    columns = choose(list(dict.fromkeys(name for _, row in objects for name in row))) if objects else []
    return [(place, {name: row.get(name) for name in columns}) for place, row in objects]


def _read_csv(path: Path, choose: Choose) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        # csv refuses fields beyond 128 KiB by default; the limit is global, so it is put back.
        limit = csv.field_size_limit(sys.maxsize)
        try:
            return _read_csv_rows(file, path, choose)
        finally:
            csv.field_size_limit(limit)


def _read_csv_rows(file: TextIO, path: Path, choose: Choose) -> Rows:
    reader = csv.DictReader(file, strict=True)
    rows: Rows = []
    try:
        if reader.fieldnames is None:
            return rows
        columns = choose(reader.fieldnames)
        for number, row in enumerate(reader, start=1):
            if None in row:  # an unquoted comma in a text would otherwise cut it short unseen
                raise UserError(f"{path}: row {number} has more fields than the header: quote fields that hold commas")
            rows.append((f"row {number}", {name: row[name] for name in columns}))
    except csv.Error as error:
        raise UserError(f"{path}: row {len(rows) + 1} is not CSV: {_one_line(error)}") from error
    return rows


def _read_hub(name: str, choose: Choose) -> Rows:
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub client raises errors of many libraries; all mean the same to the user
        raise UserError(
            f"{name} is no file, and as a hub data set it cannot be loaded: {_one_line(error)}: check the "
            "name and the network, or give a file"
        ) from error
    columns = list(choose(rows.column_names))
    return [(f"row {number}", row) for number, row in enumerate(rows.select_columns(columns), start=1)]


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_READERS: dict[str, Callable[[Path, Choose], Rows]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
}
