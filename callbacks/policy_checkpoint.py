"""Checkpoints of the newest step."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ._common import check_count


class PolicyCheckpoint(ModelCheckpoint):
    """Keeps one checkpoint, the newest: every N optimizer steps, and at the end of training.

    Lightning's own callback saves at the end only if it has saved nothing before, so a run of 30 steps that saves every
    20 would lose 10. `last.ckpt` points to the newest.

    Args:
        every_n_steps: Optimizer steps between checkpoints.
        dirpath: Folder; None is `checkpoints/` in the run's folder.

    Raises:
        UserError: `every_n_steps` is not positive.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import PolicyCheckpoint
        >>> trainer = Trainer(callbacks=[PolicyCheckpoint(every_n_steps=50)], logger=False, accelerator="cpu")
    """

    def __init__(self, every_n_steps: int = 20, dirpath: str | None = None) -> None:
        check_count("PolicyCheckpoint", "every_n_steps", every_n_steps, least=1)
        super().__init__(
            dirpath,
            filename="{step}",
            save_last="link",
            every_n_train_steps=every_n_steps,
            enable_version_counter=False,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the steps since the last checkpoint."""
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
