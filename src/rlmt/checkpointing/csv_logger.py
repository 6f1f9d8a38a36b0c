"""metrics.csv, which a kill does not tear and a resumed run goes on with."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from rlmt.checkpointing.files import atomic_write


class ResumableCSVLogger(CSVLogger):
    """Lightning's CSV logger, whose file is never half-written, and goes on where a resumed run takes it up again.

    Args:
        save_dir: folder of the run; each start of it has a folder `version_N` there, but one that goes on.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__(str(save_dir), name=None)
        self._last: int | None = None

    def go_on(self, version: int, step: int) -> None:
        """Goes on in the folder of an earlier start; to be called before anything is logged.

        Args:
            version: number of its folder.
            step: the last step whose metrics stay; later ones will be logged again.
        """
        self._version, self._last = version, step

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the file."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir, self._last)
        return self._experiment  # type: ignore[return-value]


class _Writer(ExperimentWriter):
    def __init__(self, log_dir: str, last: int | None) -> None:
        self._last = last
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if self._last is None or not path.is_file():
            super()._check_log_dir_exists()
            return
        with path.open(newline="") as file:
            table = csv.DictReader(file)
            self.metrics_keys = list(table.fieldnames or [])
            rows = [row for row in table if _step(row) is not None and _step(row) <= self._last]  # type: ignore[operator]
        self._write(rows)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="") as file:
            rows = list(csv.DictReader(file))
        self._write(rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        with atomic_write(Path(self.metrics_file_path)) as unfinished, unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


def _step(row: dict[str, Any]) -> int | None:
    """Number of a row's step; None for a row that was cut short."""
    whole = None not in row and None not in row.values()
    return int(row["step"]) if whole and row.get("step") else None
