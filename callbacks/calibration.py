"""How far a reward model's preferences can be believed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rlmt.options import PositiveInt, check_ranges

from ._common import is_dry_run, run_folder


class Calibration(Callback):
    """Draws predicted against observed preference on held-out pairs into `calibration.png`, beside metrics.csv.

    Each validation draws anew, and logs `val/calibration_error`, the mean gap between the two; testing `test/…`.

    Args:
        bins: Points of the curve; each stands for equally many pairs.

    Raises:
        UserError: `bins` is not positive.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import Calibration
        >>> trainer = Trainer(callbacks=[Calibration(bins=5)], logger=False, accelerator="cpu")
    """

    def __init__(self, bins: PositiveInt = 10) -> None:
        check_ranges(Calibration, locals())
        self.bins = bins
        self._differences: list[Tensor] = []
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the run's folder; a `fast_dev_run` leaves no picture behind."""
        self._folder = None if is_dry_run(trainer) else run_folder(trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts anew."""
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
        """Keeps the batch's differences of scores.

        Raises:
            TypeError: the module's step returned something else, so this callback does not belong in its trainer.
        """
        if not isinstance(outputs, Mapping) or "differences" not in outputs:
            raise TypeError('Calibration wants a module whose validation steps return {"differences": Tensor}')
        self._differences.append(outputs["differences"].cpu())

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws and logs."""
        self._tell(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws and logs."""
        self._tell(trainer, pl_module, "test")

    def _tell(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self._differences:
            return
        # Imported here because matplotlib takes a second to load and most commands never draw.
        from rlmt.report.calibration import calibration_bins, calibration_error, draw_calibration

        bins = calibration_bins(torch.cat(self._differences).double().numpy(), self.bins)
        pl_module.log(f"{stage}/calibration_error", calibration_error(bins))
        if self._folder is not None and trainer.is_global_zero and not trainer.sanity_checking:
            draw_calibration(self._folder / "calibration.png", bins)
