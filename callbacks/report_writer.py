"""The HTML page of a run, written while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from rlmt.options import NonNegativeInt

from ._common import PictureCallback


class ReportWriter(PictureCallback):
    """Writes `report.html` beside metrics.csv: verdicts, curves, rollouts, distributions and configuration in one file.

    The page is what `rlmt report` writes. It is refreshed every `every_n_steps` steps, and written at the end and when
    a run is interrupted or fails. It reads the run's files, so it stands after `SampleTable`, which writes rollouts.

    Args:
        every_n_steps: Steps between refreshes during training; 0 writes at the end only. `--report false` leaves the
            callback out.

    Raises:
        UserError: `every_n_steps` is negative.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import ReportWriter
        >>> trainer = Trainer(callbacks=[ReportWriter(every_n_steps=20)], logger=False, accelerator="cpu")
    """

    file_name = "report.html"
    title = "report"

    def __init__(self, every_n_steps: NonNegativeInt = 50) -> None:
        super().__init__(every_n_steps)
        self._loggers: list[Logger] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the run's folder."""
        super().setup(trainer, pl_module, stage)
        self._loggers = trainer.loggers

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refreshes the page if it is due."""
        self.draw_if_due(trainer)

    def draw(self, path: Path) -> Path | None:
        """Writes the page; None while metrics.csv has no metrics, and without a CSV logger."""
        # Imported here because most commands never write a page.
        from rlmt.report.page import page_title, write_page
        from rlmt.report.run_states import METRICS_FILE
        from rlmt.report.runs import read_run
        from rlmt.report.series import read_metrics

        for logger in self._loggers:
            logger.save()  # metrics.csv lags behind by up to 100 steps
        metrics = path.parent / METRICS_FILE
        if not metrics.is_file() or not read_metrics(metrics):
            return None
        run = read_run(path.parent)
        return write_page(path, page_title([run]), [run])
