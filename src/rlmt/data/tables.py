"""Reads the rows of a dataset: a parquet, jsonl, json or csv file, a folder, or a dataset on the Hugging Face Hub.

Only the requested columns are read. Every invalid row is reported with its file and row number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rlmt.data.dataset_splits import DataSource, held_out_source, read_folder, read_hub
from rlmt.data.table_files import READERS, Cells, Rows, SelectColumns, read_file
from rlmt.errors import UserError

__all__ = ["Cells", "DataSource", "Rows", "SelectColumns", "held_out_source", "parse_rows", "read_table"]

MAX_REPORTED_ROWS = 3
"""Number of invalid rows that an error message describes."""
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\b")

T = TypeVar("T")


def read_table(source: str | DataSource, select_columns: SelectColumns, what: str) -> Rows:
    """Reads the selected columns of all rows of a file, a folder or a Hub dataset.

    A source is a folder if one of that name exists: data files, of which those of one split are read, or what
    `save_to_disk` wrote. It is a file if it exists, has a known suffix (.parquet, .jsonl, .json, .csv) or looks like a
    path. Anything else is the name of a Hub dataset.

    Args:
        source: The source, or its path or Hub name.
        select_columns: Selects the columns to read.
        what: Plural noun for the rows, used in messages.

    Returns:
        The rows, at least one.

    Raises:
        UserError: The source cannot be read, is one shard of several, has no such split or subset, or is empty; or
            `select_columns` raises.
    """
    source = DataSource(source) if isinstance(source, str) else source
    path = Path(source.name).expanduser()
    if path.is_dir():
        rows = read_folder(source, path, select_columns)
    elif _is_file(source.name):
        _check_file(source, path)
        rows = read_file(path, select_columns)
    else:
        rows = read_hub(source, select_columns)
    if not rows:
        raise UserError(f"{source} contains no {what}; use a file with at least one row.")
    return rows


def parse_rows(source: str | DataSource, rows: Rows, parse: Callable[[int, Cells], T]) -> list[T]:
    """Parses every row and reports the invalid ones together.

    Args:
        source: The source, or its name, for messages.
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


def _is_file(name: str) -> bool:
    path = Path(name).expanduser()
    path_like = name.startswith((".", "/", "~")) or name.count("/") > 1  # Hub names are "name" or "owner/name"
    return path_like or path.suffix.lower() in READERS or path.exists()


def _check_file(source: DataSource, path: Path) -> None:
    """Raises UserError if a file does not exist, is not all of its dataset, or is asked for a split or subset."""
    if not path.exists():
        raise UserError(f"{source} does not exist; check the path.")
    for option, value in (("split", source.split), ("subset", source.subset)):
        if value is not None:
            raise UserError(f"--data.{option} {value}: {source} is a file, which has none; leave it out.")
    if (shard := _SHARD.search(path.name)) and int(shard[2]) > 1:
        raise UserError(
            f"{source} is one of {int(shard[2])} shards; pass their folder to read all of them, or rename the file to "
            "read it alone."
        )
