"""The curves of a run: rewards, lengths and the policy's drift."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from rlmt.options import NonNegativeInt
from rlmt.types import Experience

from ._common import PictureCallback, experience_of, step_metrics, step_number

DRAWN = (
    "reward/mean",
    "reward/group_std",
    "reward/malformed",
    "length/thought_mean",
    "length/thought_p95",
    "length/response_mean",
    "length/response_p95",
    "length/truncated",
    "policy/kl",
    "policy/entropy",
    "dpo/accuracy",
)
"""The metrics in the picture, saved in the checkpoint."""


class RewardCurves(PictureCallback):
    """Draws the curves of a run into `curves.png`, beside metrics.csv.

    They show the reward with its spread within groups and on the validation set, held-out rewards below it if there are
    any, lengths, malformed and truncated samples, KL (of DPO the accuracy) and entropy. The points are saved in
    checkpoints, so that a resumed run draws the whole run.

    Args:
        every_n_steps: Steps between drawings during training; 0 draws at the end only.

    Raises:
        UserError: `every_n_steps` is negative.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import RewardCurves
        >>> trainer = Trainer(callbacks=[RewardCurves(every_n_steps=20)], logger=False, accelerator="cpu")
    """

    file_name = "curves.png"
    title = "curves"

    def __init__(self, every_n_steps: NonNegativeInt = 50) -> None:
        super().__init__(every_n_steps)
        self._train: dict[str, list[float]] = {name: [] for name in ("step", *DRAWN)}
        self._validation: dict[str, list[float]] = {"step": [], "reward": []}
        self._subtitle = ""

    def state_dict(self) -> dict[str, Any]:
        """The points collected so far."""
        return {"train": self._train, "validation": self._validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the points up to the checkpoint."""
        self._train = {name: list(values) for name, values in state_dict["train"].items()}
        self._validation = {name: list(values) for name, values in state_dict["validation"].items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collects the step's metrics, as the module logged them."""
        logged = step_metrics(trainer, outputs)
        generations = 1 + int(logged.get("reward/refills", 0))
        self._subtitle = _subtitle(pl_module, experience_of(outputs), trainer.world_size, generations)
        for name in DRAWN:
            self._train[name].append(logged.get(name, math.nan))
        self._train["step"].append(step_number(trainer))
        self.draw_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collects the validation reward and the held-out rewards, as the module logged them."""
        logged = trainer.callback_metrics
        if "val/reward_mean" not in logged or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        held_out: Any = getattr(pl_module, "held_out", None)
        before = len(self._validation["step"])
        for name in held_out.names if held_out is not None else ():
            self._validation.setdefault(f"val/{name}", [math.nan] * before)  # a resumed run may have a new one
        self._validation["step"].append(step_number(trainer))
        self._validation["reward"].append(float(logged["val/reward_mean"]))
        for name, values in self._validation.items():
            if name.startswith("val/"):
                values.append(float(logged.get(name, math.nan)))

    def draw(self, path: Path) -> Path | None:
        """Draws the curves of the run so far."""
        if not self._train["step"]:
            return None
        # Imported here because matplotlib takes a second to load and most commands never draw.
        from rlmt.report.curves import draw_curves

        return draw_curves(path, self._train, self._validation, self._subtitle)


def _subtitle(pl_module: LightningModule, experience: Experience, world_size: int, generations: int) -> str:
    """Algorithm, format and batch size of a run; dynamic sampling generated `generations` batches in a step."""
    rollouts = experience.rollouts
    algorithm: Any = getattr(pl_module, "algorithm", None)
    thinking: Any = getattr(pl_module, "format", None)
    parts = [type(algorithm).__name__] if algorithm is not None else []
    if thinking is not None:
        parts.append(f"format {thinking.name}")
    parts.append(f"{len(rollouts.prompts) // generations * world_size} prompts × {rollouts.group_size} samples a step")
    return " · ".join(parts)
