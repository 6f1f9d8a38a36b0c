"""run.json: command and versions of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlmt.checkpointing.run_record import new_record, now, read_record, write_record

from ._common import is_dry_run, report_write_errors, run_folder


class RunRecord(Callback):
    """Writes `run.json` beside metrics.csv: the command line, own config files, versions and the repository's commit.

    The file is written after the first step, so a start that fails earlier leaves none. A resumed run keeps the record
    and adds the time.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import RunRecord
        >>> trainer = Trainer(callbacks=[RunRecord()], logger=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._record: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the run's folder."""
        self._folder = run_folder(trainer) if stage == "fit" and not is_dry_run(trainer) else None
        self._record = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the record once."""
        if self._folder is None or self._record or not trainer.is_global_zero:
            return
        device = f"{trainer.world_size} × {_device_name(pl_module)}"
        earlier = read_record(self._folder)
        resumed = {"resumed": [*earlier.get("resumed", []), now()]}
        self._record = earlier | resumed if earlier else new_record(sys.argv[1:], device)
        with report_write_errors("run.json"):
            write_record(self._folder, self._record)


def _device_name(pl_module: LightningModule) -> str:
    """Name of the module's device."""
    if pl_module.device.type != "cuda":
        return str(pl_module.device.type)
    import torch

    return torch.cuda.get_device_name(pl_module.device)
