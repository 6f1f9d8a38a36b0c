"""Reads the rows of a dataset: a parquet, jsonl, json or csv file, or a dataset on the Hugging Face Hub.

Only the requested columns are read. Every invalid row is reported with its file and row number.
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

MAX_REPORTED_ROWS = 3
"""Number of invalid rows that an error message describes."""

Cells = dict[str, object]
"""A row's cells by column; None for a missing cell."""
Rows = list[tuple[str, Cells]]
"""Each row's position in the file ("row 3") and its cells."""
SelectColumns = Callable[[Sequence[str]], Sequence[str]]
"""Returns the columns to read of those that a source has; raises UserError if required ones are missing."""

T = TypeVar("T")


def read_table(source: str, select_columns: SelectColumns, what: str) -> Rows:
    """Reads the selected columns of all rows of a file or a Hub dataset.

    A source is a file if it exists, has a known suffix (.parquet, .jsonl, .json, .csv) or looks like a path. Anything
    else is the name of a Hub dataset; its `train` split is read. The columns of a JSON file are the keys of all its
    rows.

    Args:
        source: Path or Hub name.
        select_columns: Selects the columns to read.
        what: Plural noun for the rows, used in messages.

    Returns:
        The rows, at least one.

    Raises:
        UserError: The source cannot be read or is empty, or `select_columns` raises.
    """
    rows = _read_file(source, select_columns) if _is_file(source) else _read_hub(source, select_columns)
    if not rows:
        raise UserError(f"{source} contains no {what}; use a file with at least one row.")
    return rows


def parse_rows(source: str, rows: Rows, parse: Callable[[int, Cells], T]) -> list[T]:
    """Parses every row and reports the invalid ones together.

    Args:
        source: Path or Hub name, for messages.
        rows: The rows.
        parse: Receives a row's number, from 0, and its cells; raises ValueError with a short reason.

    Returns:
        One parsed value per row.

    Raises:
        UserError: Some rows are invalid; the message describes the first ones.
    """
    parsed: list[T] = []
    invalid: list[str] = []
    for index, (place, cells) in enumerate(rows):
        try:
            parsed.append(parse(index, cells))
        except ValueError as error:
            invalid.append(f"{place}: {error}")
    if invalid:
        hidden = len(invalid) - MAX_REPORTED_ROWS
        more = f"; and {hidden:,} more invalid rows" if hidden > 0 else ""
        raise UserError(f"{source}: {'; '.join(invalid[:MAX_REPORTED_ROWS])}{more}; fix or remove these rows.")
    return parsed


def _is_file(source: str) -> bool:
    path = Path(source).expanduser()
    path_like = source.startswith((".", "/", "~")) or source.count("/") > 1  # Hub names are "name" or "owner/name"
    return path_like or path.suffix.lower() in _READERS or path.exists()


def _read_file(source: str, select_columns: SelectColumns) -> Rows:
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"{source} does not exist; check the path.")
    if path.is_dir():
        raise UserError(f"{source} is a folder; pass a file in it.")
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{source} has an unknown extension {path.suffix!r}; use one of {', '.join(_READERS)}.")
    try:
        return _READERS[path.suffix.lower()](path, select_columns)
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text (byte {error.start}); convert it to UTF-8.") from error
    except OSError as error:
        raise UserError(f"{source} cannot be read: {_first_line(error)}.") from error


def _read_parquet(path: Path, select_columns: SelectColumns) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = list(select_columns(pyarrow.parquet.read_schema(path).names))
        rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file: {_first_line(error)}.") from error
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]


def _read_jsonl(path: Path, select_columns: SelectColumns) -> Rows:
    rows: list[tuple[str, object]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    rows.append((f"line {number}", json.loads(line)))
                except ValueError as error:
                    raise UserError(f"{path}: line {number} is not JSON: {_first_line(error)}.") from error
    return _rows_of_objects(rows, select_columns, path)


def _read_json(path: Path, select_columns: SelectColumns) -> Rows:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {_first_line(error)}; use .jsonl for one object per line.") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} is not a list; a .json file is a list of objects, one per row.")
    return _rows_of_objects([(f"row {number}", row) for number, row in enumerate(rows, start=1)], select_columns, path)


def _rows_of_objects(rows: list[tuple[str, object]], select_columns: SelectColumns, path: Path) -> Rows:
    objects: list[tuple[str, dict[str, object]]] = []
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{path}: {place} is {type_name(row)}, not an object of columns and values.")
        objects.append((place, row))
    columns = select_columns(list(dict.fromkeys(name for _, row in objects for name in row))) if objects else []
    return [(place, {name: row.get(name) for name in columns}) for place, row in objects]


def _read_csv(path: Path, select_columns: SelectColumns) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        # csv refuses fields above 128 KiB by default. The limit is global, so it is restored.
        limit = csv.field_size_limit(sys.maxsize)
        try:
            return _read_csv_rows(file, path, select_columns)
        finally:
            csv.field_size_limit(limit)


def _read_csv_rows(file: TextIO, path: Path, select_columns: SelectColumns) -> Rows:
    reader = csv.DictReader(file, strict=True)
    rows: Rows = []
    try:
        if reader.fieldnames is None:
            return rows
        columns = select_columns(reader.fieldnames)
        for number, row in enumerate(reader, start=1):
            if None in row:  # an unquoted comma in a text would otherwise truncate it silently
                raise UserError(f"{path}: row {number} has more fields than the header; quote fields with commas.")
            rows.append((f"row {number}", {name: row[name] for name in columns}))
    except csv.Error as error:
        raise UserError(f"{path}: row {len(rows) + 1} is not CSV: {_first_line(error)}.") from error
    return rows


def _read_hub(name: str, select_columns: SelectColumns) -> Rows:
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the Hub client raises errors of many libraries; all mean the same to the user
        raise UserError(
            f"{name} is not a file and cannot be loaded as a Hub dataset: {_first_line(error)}; check the name and the "
            "network, or pass a file."
        ) from error
    columns = list(select_columns(rows.column_names))
    return [(f"row {number}", row) for number, row in enumerate(rows.select_columns(columns), start=1)]


def _first_line(error: Exception) -> str:
    """The first line of an exception's message, without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


_READERS: dict[str, Callable[[Path, SelectColumns], Rows]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
}
