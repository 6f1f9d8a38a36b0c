"""The logger of metrics.csv: a folder for each run, atomic writes, and one file for a run and its resumption."""

from __future__ import annotations

import csv
import os
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from rlmt.checkpointing.files import atomic_write
from rlmt.checkpointing.reserved_version import ReservedVersion

LATEST = "latest"
"""Name of the link to the newest `version_N`, of a training run if there is one."""


class ResumableCSVLogger(CSVLogger):
    """Lightning's CSV logger with atomic rewrites, which a resumed run continues.

    A start reserves its number when the folder is first used, so that no two runs share one, and creates the folder
    `version_N` when it first logs: a start that fails or is killed earlier leaves none. The link `latest` beside the
    folders is set when a run has logged something.

    Args:
        save_dir: Folder of the run; each start gets a folder `version_N` in it, except a resumed one.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__(str(save_dir), name=None)
        self._last_step: int | None = None
        self._reserved: ReservedVersion | None = None
        self._linked = False

    def _get_next_version(self) -> int:
        """Number of a new folder `version_N`, which rank 0 reserves."""
        first = int(super()._get_next_version())
        if getattr(rank_zero_only, "rank", 0):
            return first
        root = Path(self.root_dir)
        for version in count(first):
            self._reserved = ReservedVersion.take(root, version)
            if self._reserved is not None:
                return version
        raise AssertionError  # unreachable: `count` does not end

    def _release(self) -> None:
        """Gives up the reservation, if there is one."""
        if self._reserved is not None:
            self._reserved.release()
        self._reserved = None

    @rank_zero_only
    def keep(self, trained: bool) -> None:
        """Keeps this run's folder, also if the run fails later, and links `latest` to it.

        Args:
            trained: Whether the run trains. Another run does not take the link from a folder with checkpoints.
        """
        self._release()
        link, target = Path(self.root_dir, LATEST), Path(self.log_dir)
        if self._linked or not target.is_dir() or (not trained and (link / "checkpoints").is_dir()):
            return
        self._linked = True
        if link.is_dir() and not link.is_symlink():
            rank_zero_warn(f"{link} is a folder, so no link to {target.name} is made; rename the folder.")
            return
        new = link.with_name(f".{LATEST}.{os.getpid()}")
        new.unlink(missing_ok=True)
        new.symlink_to(target.name)
        new.replace(link)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes metrics.csv, or removes the folder of a start that logged nothing."""
        if self._reserved is None or (self._experiment is not None and self._experiment.metrics):
            super().finalize(status)
        else:
            folder = Path(self.log_dir)
            (folder / ExperimentWriter.NAME_HPARAMS_FILE).unlink(missing_ok=True)
            with suppress(OSError):  # there is none, or a user's own code has written to it
                folder.rmdir()
        self._release()

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
