"""How long the policy thinks and answers."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlmt.distributed.collectives import all_gather_tensor
from rlmt.types import Experience

from ._common import experience_of, log_step, over_ranks


def length_metrics(experience: Experience) -> dict[str, float]:
    """Mean and 95th percentile of thought and response lengths in tokens, and the fraction of truncated samples.

    Every sample of every rank counts, malformed ones too: a thought that never closes is all thought and no response.
    The percentile interpolates linearly between samples. All ranks have to call it together.
    """
    metrics: dict[str, float] = {}
    for part, tokens in (("thought", experience.thought_tokens), ("response", experience.response_tokens)):
        tokens = all_gather_tensor(tokens.cpu().double())
        metrics[f"length/{part}_mean"] = float(tokens.mean())
        metrics[f"length/{part}_p95"] = float(torch.quantile(tokens, 0.95))
    metrics["length/truncated"] = float(all_gather_tensor(experience.truncated.double()).mean())
    return metrics


class CoTLength(Callback):
    """Logs how long thoughts and responses are, in sampled tokens.

    Training steps log `length/{thought,response}_{mean,p95}` and `length/truncated`; the progress bar shows the mean
    thought as `thought`. Validation logs `val/thought_tokens` and `val/response_tokens`, testing the same under
    `test/`: means over the whole set.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import CoTLength
        >>> trainer = Trainer(callbacks=[CoTLength()], logger=False, accelerator="cpu")
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the step's lengths."""
        experience = experience_of(outputs)
        metrics = over_ranks(trainer, pl_module, length_metrics(experience))
        # Whole tokens: the bar would show 1234.5 as 1.23e+3.
        log_step(pl_module, metrics, len(experience.rollouts), bar={"thought": round(metrics["length/thought_mean"])})

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds the batch to the mean lengths over the whole set."""
        self._log_epoch(pl_module, "test" if trainer.testing else "val", experience_of(outputs))

    on_test_batch_end = on_validation_batch_end

    def _log_epoch(self, pl_module: LightningModule, stage: str, experience: Experience) -> None:
        for part, tokens in (("thought", experience.thought_tokens), ("response", experience.response_tokens)):
            pl_module.log(
                f"{stage}/{part}_tokens",
                tokens.float().mean(),
                on_step=False,
                on_epoch=True,
                batch_size=len(experience.rollouts),
                sync_dist=True,
            )
