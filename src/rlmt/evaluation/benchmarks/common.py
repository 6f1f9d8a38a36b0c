"""What the benchmarks share: reading their data, and questions to judges with answers in JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlmt.data.messages import text_problem, type_name
from rlmt.data.tables import Cells, DataSource, parse_rows, read_table
from rlmt.errors import UserError, first_line
from rlmt.evaluation.benchmark import Benchmark, Item, Row

T = TypeVar("T")


def read_items(
    benchmark: Benchmark,
    path: str,
    columns: Sequence[str],
    parse: Callable[[int, Cells], Item | None],
    subset: str | None = None,
) -> list[Item]:
    """Reads the items of a benchmark whose data are one table.

    Args:
        benchmark: The benchmark.
        path: File, folder or Hub dataset.
        columns: Columns that it must have.
        parse: Receives a row's number, from 0, and its cells. It returns the item, or None for a row that does not
            count, and raises ValueError with a short reason.
        subset: Subset of the benchmark's own Hub dataset.

    Raises:
        UserError: The data cannot be read, lack a column, have invalid rows or no item, or an id occurs twice.
    """
    items = [item for item in read_table_rows(benchmark, path, columns, parse, subset) if item is not None]
    check_ids(path, items)
    return items


def read_table_rows(
    benchmark: Benchmark,
    path: str,
    columns: Sequence[str],
    parse: Callable[[int, Cells], T],
    subset: str | None = None,
) -> list[T]:
    """Reads and parses the rows of a table; see `read_items`.

    Raises:
        UserError: The data cannot be read, lack a column, or have invalid rows.
    """
    if path.startswith("https://"):
        raise UserError(f"{path} is a page, not a file; download the data of {benchmark.title} from it and pass them.")

    def select(found: Sequence[str]) -> Sequence[str]:
        if missing := [name for name in columns if name not in found]:
            names = ", ".join(map(repr, found))
            raise UserError(
                f"{path} has no column {missing[0]!r}, only {names}; use the data of {benchmark.title} from "
                f"{benchmark.source}."
            )
        return columns

    source = DataSource(path, subset=subset if path == benchmark.source else None)
    return parse_rows(source, read_table(source, select, "prompts"), parse)


def check_ids(path: str, items: Sequence[Item]) -> None:
    """Raises UserError if there is no item, or an id occurs twice: verdicts and resumed runs rely on ids."""
    if not items:
        raise UserError(f"{path} contains no prompt that counts; use another file.")
    name, count = Counter(item.id for item in items).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: the id {name!r} occurs {count} times; make ids unique.")


def read_text(folder: str, name: str, benchmark: Benchmark) -> str:
    """The text of a file in the folder of a benchmark whose data are several files.

    Raises:
        UserError: It does not exist or is not UTF-8.
    """
    try:
        return existing_file(folder, name, benchmark).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder}/{name} cannot be read: {first_line(error)}; download it again.") from error


def existing_file(folder: str, name: str, benchmark: Benchmark) -> Path:
    """A file in the folder of a benchmark whose data are several files.

    Raises:
        UserError: It does not exist.
    """
    path = Path(folder).expanduser() / name
    if not path.is_file():
        raise UserError(f"{folder} has no file {name}; download the data of {benchmark.title} from {benchmark.source}.")
    return path


def text_cell(cells: Cells, column: str) -> str:
    """A cell that holds text; raises ValueError if it does not."""
    value = cells[column]
    if problem := text_problem(value):
        raise ValueError(f"`{column}` {problem}")
    return str(value)


def json_cell(cells: Cells, column: str, kind: type[T]) -> T:
    """A cell that holds a list or an object, possibly as JSON text; raises ValueError if it does not."""
    value = cells[column]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"`{column}` is text, but not JSON") from None
    if not isinstance(value, kind):
        raise ValueError(f"`{column}` is {type_name(value)}, not of type {kind.__name__}")
    return value


def response_is_a(benchmark: Benchmark, item: Item) -> bool:
    """Whether the judge sees the response first: a coin that falls the same way whenever the item is judged."""
    return hashlib.blake2b(f"{benchmark.name}/{item.id}".encode(), digest_size=1).digest()[0] % 2 == 0


def share_of_formed(rows: Sequence[Row], figure: Callable[[Sequence[Row]], float]) -> float:
    """A figure of the well-formed rows, times their share: malformed output is 0 at any length and style.

    Args:
        rows: Counted rows.
        figure: Computes a figure of at least one row.

    Returns:
        The figure; nan for no rows.
    """
    formed = [row for row in rows if not row.malformed]
    total = sum(row.score.weight for row in rows)
    if not formed:
        return 0.0 if rows else math.nan
    return figure(formed) * sum(row.score.weight for row in formed) / total


def truncate_words(text: str, limit: int) -> str:
    """The first `limit` words between spaces, with a mark if there are more."""
    words = text.split(" ")
    return text if len(words) <= limit else " ".join(words[:limit]) + "... (truncated)"


def last_json_object(text: str) -> dict[str, Any] | None:
    """The last complete JSON object in a text, outside of any other; None if there is none.

    Line ends within strings are accepted, because models write them.
    """
    decoder = json.JSONDecoder(strict=False)
    found, start = None, text.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        start = text.find("{", end)
    return found
