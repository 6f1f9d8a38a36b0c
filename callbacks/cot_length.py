"""How long the policy thinks and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from rlmt.options import NonNegativeInt

from ._common import PictureCallback, experience_of, step_number

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles of the lengths of a step that are drawn."""


class CoTLength(PictureCallback):
    """Draws how the lengths of thoughts and responses are distributed over a run, into `cot_length.png`.

    Lengths are in sampled tokens. Each step gives a median and two bands, of the middle 50 % and 90 % of its samples
    (of rank 0); the points are saved in checkpoints, so that a resumed run draws the whole run. Means and 95th
    percentiles are logged by the module, as `length/{thought,response}_{mean,p95}` and `length/truncated`, and as
    `val/thought_tokens` and `val/response_tokens` for held-out prompts.

    Args:
        every_n_steps: Steps between drawings during training; 0 draws at the end only.

    Raises:
        UserError: `every_n_steps` is negative.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import CoTLength
        >>> trainer = Trainer(callbacks=[CoTLength(every_n_steps=20)], logger=False, accelerator="cpu")
    """

    file_name = "cot_length.png"
    title = "lengths of thoughts and responses"

    def __init__(self, every_n_steps: NonNegativeInt = 50) -> None:
        super().__init__(every_n_steps)
        self._steps: list[int] = []
        self._lengths: dict[str, list[list[float]]] = {"thought": [], "response": []}

    def state_dict(self) -> dict[str, Any]:
        """The points collected so far."""
        return {"steps": self._steps, "lengths": self._lengths}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the points up to the checkpoint."""
        self._steps = list(state_dict["steps"])
        self._lengths = {part: [list(values) for values in state_dict["lengths"][part]] for part in self._lengths}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collects the quantiles of the step's lengths."""
        experience = experience_of(outputs)
        quantiles = torch.tensor(QUANTILES, dtype=torch.float64)
        for part, tokens in (("thought", experience.thought_tokens), ("response", experience.response_tokens)):
            self._lengths[part].append(torch.quantile(tokens.cpu().double(), quantiles).tolist())
        self._steps.append(step_number(trainer))
        self.draw_if_due(trainer)

    def draw(self, path: Path) -> Path | None:
        """Draws the lengths of the run so far."""
        if not self._steps:
            return None
        # Imported here because matplotlib takes a second to load and most commands never draw.
        from rlmt.report.lengths import draw_lengths

        return draw_lengths(path, self._steps, self._lengths)
