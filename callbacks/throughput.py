"""Where the time of a step goes."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ._common import experience_of, log_step, metrics_of, over_ranks


class Throughput(Callback):
    """Logs the seconds of each phase of a step and the sampled tokens a second.

    `time/{rollout,sync,reward,update}_s` come from the step itself. `time/step_s` is the wall-clock time from the end
    of the previous step to the end of this one, validation left out: the rollouts of a step are drawn while its batch
    is being fetched, which is before `on_train_batch_start`. The first step also holds the start of the engine.
    `perf/tokens_per_s` is the sampled tokens of the step divided by `time/step_s`, summed over ranks.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import Throughput
        >>> trainer = Trainer(callbacks=[Throughput()], logger=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        self._step_began = 0.0
        self._validation_began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock of the first step."""
        self._step_began = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._validation_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the clock go on where it stopped."""
        self._step_began += time.perf_counter() - self._validation_began

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the step's times."""
        experience = experience_of(outputs)
        now = time.perf_counter()
        seconds, self._step_began = now - self._step_began, now
        metrics = {name: value for name, value in metrics_of(outputs).items() if name.startswith(("time/", "perf/"))}
        metrics["time/step_s"] = seconds
        metrics["perf/tokens_per_s"] = float(experience.lengths.sum()) / seconds
        log_step(pl_module, over_ranks(trainer, pl_module, metrics), len(experience.rollouts))
