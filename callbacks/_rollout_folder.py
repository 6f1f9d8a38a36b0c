"""A folder of rollout files that a run adds to, step by step."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa

from rlmt.engines.rollout_files import read_rollouts, write_rollouts

_FILE = re.compile(r"rollouts_(\d+)-(\d+)((?:\.rank\d+)?)\.parquet")


class RolloutFolder:
    """Files of one rank, named by the first and the last step in them.

    Args:
        path: The folder; it is made with the first file.
        rank: Suffix of the rank's files; empty with one rank.
    """

    def __init__(self, path: Path, rank: str = "") -> None:
        self._path = path
        self._rank = rank
        self._pending: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        """Keeps rollouts in memory until `flush`."""
        self._pending.append(table)

    def flush(self) -> None:
        """Writes the pending rollouts; they replace rows of the same steps from before an interruption."""
        if not self._pending:
            return
        table = pa.concat_tables(self._pending)
        new = set(table["step"].to_pylist())
        first, last = min(new), max(new)
        overlapping = [file for file in self._files() if file[0] <= last and file[1] >= first]
        for start, end, path in overlapping:
            earlier = read_rollouts(path).replace_schema_metadata(table.schema.metadata)
            kept = earlier.filter(pa.array([step not in new for step in earlier["step"].to_pylist()], pa.bool_()))
            if len(kept):
                table = pa.concat_tables([table, kept]).sort_by("step")
                first, last = min(first, start), max(last, end)
        target = self._file(first, last)
        write_rollouts(table, target)
        for _, _, path in overlapping:
            if path != target:
                path.unlink()
        self._pending = []

    def remove_after(self, last: int) -> None:
        """Removes rows of steps after `last`, the last step of the checkpoint that the run resumes from."""
        for start, end, path in self._files():
            if end <= last:
                continue
            if start <= last:
                table = read_rollouts(path)
                kept = table.filter(pa.array([step <= last for step in table["step"].to_pylist()], pa.bool_()))
                write_rollouts(kept, self._file(start, max(kept["step"].to_pylist())))
            path.unlink()

    def _file(self, first: int, last: int) -> Path:
        return self._path / f"rollouts_{first:06d}-{last:06d}{self._rank}.parquet"

    def _files(self) -> list[tuple[int, int, Path]]:
        """First step, last step and path of each file of this rank."""
        found = [(_FILE.fullmatch(path.name), path) for path in self._path.glob("rollouts_*.parquet")]
        return [(int(m[1]), int(m[2]), path) for m, path in found if m is not None and m[3] == self._rank]
