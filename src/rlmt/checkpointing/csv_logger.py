"""The logger of metrics.csv: atomic writes, and one file for a run and its resumption."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from rlmt.checkpointing.files import atomic_write


class ResumableCSVLogger(CSVLogger):
    """Lightning's CSV logger with atomic rewrites, which a resumed run continues.

    Args:
        save_dir: Folder of the run; each start gets a folder `version_N` in it, except a resumed one.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__(str(save_dir), name=None)
        self._last_step: int | None = None

    def resume(self, version: int, step: int) -> None:
        """Continues the file of an earlier start; call it before anything is logged.

        Args:
            version: Number N of the folder `version_N`.
            step: Last step whose metrics are kept; later steps will be logged again.
        """
        self._version, self._last_step = version, step

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of metrics.csv."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir, self._last_step)
        return self._experiment  # type: ignore[return-value]


class _Writer(ExperimentWriter):
    def __init__(self, log_dir: str, last_step: int | None) -> None:
        self._last_step = last_step
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if self._last_step is None or not path.is_file():
            super()._check_log_dir_exists()
            return
        with path.open(newline="") as file:
            table = csv.DictReader(file)
            self.metrics_keys = list(table.fieldnames or [])
            rows = [row for row in table if _step(row) is not None and _step(row) <= self._last_step]  # type: ignore[operator]
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
    """Step number of a row; None for a truncated row."""
    complete = None not in row and None not in row.values()
    return int(row["step"]) if complete and row.get("step") else None
