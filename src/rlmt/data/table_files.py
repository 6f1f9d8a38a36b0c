"""Reads the rows of one file: parquet, jsonl, json or csv. Only the requested columns are read."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from rlmt.data.messages import type_name
from rlmt.errors import UserError, first_line

Cells = dict[str, object]
"""A row's cells by column; None for a missing cell."""
Rows = list[tuple[str, Cells]]
"""Each row's position in the source ("row 3") and its cells."""
SelectColumns = Callable[[Sequence[str]], Sequence[str]]
"""Returns the columns to read of those that a source has; raises UserError if required ones are missing."""


def read_file(path: Path, select_columns: SelectColumns) -> Rows:
    """Reads the selected columns of all rows of a file.

    The columns of a JSON file are the keys of all its rows.

    Args:
        path: The file.
        select_columns: Selects the columns to read.

    Returns:
        The rows; none for an empty file.

    Raises:
        UserError: The file cannot be read, or `select_columns` raises.
    """
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path} has an unknown extension {path.suffix!r}; use one of {', '.join(READERS)}.")
    try:
        return READERS[path.suffix.lower()](path, select_columns)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}.") from error


def _read_parquet(path: Path, select_columns: SelectColumns) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = list(select_columns(pyarrow.parquet.read_schema(path).names))
        rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file: {first_line(error)}.") from error
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]


def _read_jsonl(path: Path, select_columns: SelectColumns) -> Rows:
    rows: list[tuple[str, object]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    rows.append((f"line {number}", json.loads(line)))
                except ValueError as error:
                    raise UserError(f"{path}: line {number} is not JSON: {first_line(error)}.") from error
    return _rows_of_objects(rows, select_columns, path)


def _read_json(path: Path, select_columns: SelectColumns) -> Rows:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}; use .jsonl for one object per line.") from error
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
        raise UserError(f"{path}: row {len(rows) + 1} is not CSV: {first_line(error)}.") from error
    return rows


READERS: dict[str, Callable[[Path, SelectColumns], Rows]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
}
"""Reader of each file type, by suffix."""
