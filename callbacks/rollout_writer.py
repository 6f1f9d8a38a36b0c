"""Writes the samples of `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from lightning.pytorch import Callback, LightningModule, Trainer

from rlmt.distributed import collectives
from rlmt.engines.rollout_files import interleave_ranks, rollout_table
from rlmt.errors import UserError
from rlmt.options import check_writable

from ._common import experience_of, format_of, run_folder, say


class RolloutWriter(Callback):
    """Writes every sample of `predict` to one parquet file, batch by batch, so memory does not grow.

    See `rlmt.engines.rollout_files` for the columns; `step` is the number of the batch. Until it is complete the file
    is called `….partial.parquet`; a run that fails or is interrupted leaves a readable file of that name. Rank 0 writes
    the samples of all ranks, in the order of the prompts.

    Args:
        path: File to write; null is `predictions.parquet` beside metrics.csv.

    Raises:
        UserError: The path does not end in .parquet.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import RolloutWriter
        >>> trainer = Trainer(callbacks=[RolloutWriter("samples.parquet")], logger=False, accelerator="cpu")
    """

    def __init__(self, path: str | None = None) -> None:
        if path is not None and not path.endswith(".parquet"):
            raise UserError(f"RolloutWriter.path is {path!r}: give a file name that ends in .parquet")
        self.path = path
        self._final = Path("predictions.parquet")
        self._writer: pq.ParquetWriter | None = None
        self._batches = 0
        self._prompts = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the file to write.

        Raises:
            UserError: The file cannot be written.
        """
        if stage != "predict":
            return
        self._final = run_folder(trainer) / "predictions.parquet" if self.path is None else Path(self.path)
        if trainer.is_global_zero:
            check_writable(self._final.parent, "The folder of the predictions")
            if self._final.is_dir():
                raise UserError(f"{self._final}: is a folder; give the path of a file for the predictions.")
        self._batches = self._prompts = 0

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds the batch to the file as one row group."""
        experience = experience_of(outputs)
        table = rollout_table(experience, self._batches, format=format_of(pl_module), rank=trainer.global_rank)
        if trainer.world_size > 1:
            loader: Any = trainer.predict_dataloaders
            table = interleave_ranks(collectives.all_gather_object(table), len(loader.dataset) - self._prompts)
        self._prompts += trainer.world_size * len(experience.rollouts.prompts)
        self._batches += 1
        if not trainer.is_global_zero:
            return
        if self._writer is None:
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._partial, table.schema, compression="zstd")
        self._writer.write_table(table)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the file, renames it to its final name and prints it."""
        if self._close():
            self._partial.replace(self._final)
            say(f"predictions: {self._final}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the partial file and prints its name."""
        if self._close():
            say(f"predictions so far: {self._partial}")

    @property
    def _partial(self) -> Path:
        return self._final.with_suffix(".partial.parquet")

    def _close(self) -> bool:
        """Closes the file; returns whether it was open."""
        if self._writer is None:
            return False
        self._writer.close()
        self._writer = None
        return True
