"""Calibration of a reward model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rlmt.rewards.calibration import calibration_bins

from ._common import is_dry_run, run_folder


class Calibration(Callback):
    """Draws predicted against observed preference on held-out pairs into `calibration.png`, beside metrics.csv.

    Each validation and test replaces it. The module logs the mean gap between the two as `val/calibration_error` and
    `test/calibration_error`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import Calibration
        >>> trainer = Trainer(callbacks=[Calibration()], logger=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        self._differences: list[Tensor] = []
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the run's folder; a `fast_dev_run` draws nothing."""
        self._folder = None if is_dry_run(trainer) else run_folder(trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discards the pairs of the validation before."""
        self._differences = []

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collects the score differences of the batch.

        Raises:
            TypeError: The module's step returned something else, so the callback does not belong in its trainer.
        """
        if not isinstance(outputs, Mapping) or "differences" not in outputs:
            raise TypeError('Calibration requires a module whose validation steps return {"differences": Tensor}')
        self._differences.append(outputs["differences"].cpu())

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the picture."""
        if self._folder is None or not self._differences or not trainer.is_global_zero or trainer.sanity_checking:
            return
        # Imported here because matplotlib takes a second to load and most commands never draw.
        from rlmt.report.calibration import draw_calibration

        bins = calibration_bins(torch.cat(self._differences).double().numpy())
        draw_calibration(self._folder / "calibration.png", bins)

    on_test_epoch_end = on_validation_epoch_end
