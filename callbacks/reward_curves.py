"""What the policy earns, step by step, and the run's one picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlmt.distributed.collectives import all_gather_tensor
from rlmt.errors import UserError
from rlmt.ranges import NonNegativeInt, check_ranges
from rlmt.types import Experience

from ._common import (
    experience_of,
    failing,
    is_dry_run,
    log_step,
    metrics_of,
    over_ranks,
    run_folder,
    say,
    step_number,
)
from .cot_length import length_metrics

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
"""The metrics in the picture, kept in the checkpoint."""
OF_UPDATE = [name for name in DRAWN if name.startswith(("policy/", "dpo/"))]
"""Those that the update found, which not every objective has."""


def reward_metrics(experience: Experience) -> dict[str, float]:
    """What a batch of rewards looks like.

    Returns:
        `reward/mean` and `reward/std` over the B samples; `reward/group_std`, the mean over prompts of the standard
        deviation within a prompt's samples; `reward/zero_std_groups`, the fraction of prompts whose samples all have
        the same reward, so that they teach nothing; `reward/malformed`, the fraction of samples that break the format;
        and `reward/<name>` for each reward, its mean raw score over the samples it scored, NaN if it scored none.
        Standard deviations are those of the population (divided by n, not n - 1), so a single sample has 0. Of several
        ranks, which have to call it together, `reward/std` and `reward/<name>` are over all, the others of this one.

    Raises:
        UserError: A reward's name is one of the names above.
    """
    rewards = experience.scores.total.detach().cpu().double()
    group_of = experience.group.cpu()
    groups = [rewards[group_of == group] for group in torch.unique(group_of)]
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(all_gather_tensor(rewards).std(correction=0)),
        "reward/group_std": float(torch.stack([group.std(correction=0) for group in groups]).mean()),
        # Compared and not subtracted: the standard deviation of equal numbers can come out as 1e-17.
        "reward/zero_std_groups": sum(bool((group == group[0]).all()) for group in groups) / len(groups),
        "reward/malformed": sum(not split.ok for split in experience.splits) / len(experience.splits),
    }
    for name, scores in experience.scores.parts.items():
        if f"reward/{name}" in metrics:
            raise UserError(f"a reward is called {name!r}, which is the metric reward/{name}: give it another name")
        metrics[f"reward/{name}"] = float(all_gather_tensor(scores.detach().cpu().double()).nanmean())
    return metrics


class RewardCurves(Callback):
    """Logs rewards, and draws the curves of the run into `curves.png`, beside metrics.csv.

    See `reward_metrics` for what is logged, over all samples that were drawn; what the objective found under reward/ is
    logged beside it: `reward/overlong_penalty`, the mean over the samples trained on, and with dynamic sampling
    `reward/{refills,dropped_groups,surplus_groups}`. The progress bar shows the mean as `reward`. The picture has the
    reward with its spread within groups and on the validation set, held-out rewards below it if there are any, lengths,
    malformed and truncated samples, KL (of DPO the accuracy) and entropy. Its points travel in checkpoints, so a
    resumed run draws the whole curve. It is drawn every `every_n_steps`, at the end, and when a run is interrupted or
    fails.

    Args:
        every_n_steps: How often to draw while training; 0 draws at the end only.

    Raises:
        UserError: `every_n_steps` is negative.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import RewardCurves
        >>> trainer = Trainer(callbacks=[RewardCurves(every_n_steps=20)], logger=False, accelerator="cpu")
    """

    def __init__(self, every_n_steps: NonNegativeInt = 50) -> None:
        check_ranges(RewardCurves, locals())
        self.every_n_steps = every_n_steps
        self._train: dict[str, list[float]] = {name: [] for name in ("step", *DRAWN)}
        self._validation: dict[str, list[float]] = {"step": [], "reward": []}
        self._folder: Path | None = None
        self._drawn: Path | None = None
        self._subtitle = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the run's folder; a `fast_dev_run` leaves no picture behind."""
        fitting = stage == "fit" and not is_dry_run(trainer)
        self._folder = run_folder(trainer) if fitting else None

    def state_dict(self) -> dict[str, Any]:
        """The points drawn so far."""
        return {"train": self._train, "validation": self._validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the points up to the checkpoint."""
        self._train = {name: list(values) for name, values in state_dict["train"].items()}
        self._validation = {name: list(values) for name, values in state_dict["validation"].items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the step's rewards and keeps its points."""
        experience = experience_of(outputs)
        found = {name: value for name, value in metrics_of(outputs).items() if name.startswith("reward/")}
        rewards = reward_metrics(experience) | found
        policy = {name: metrics_of(outputs).get(name, math.nan) for name in OF_UPDATE}
        metrics = over_ranks(trainer, pl_module, rewards | length_metrics(experience) | policy)
        logged = {name: metrics[name] for name in rewards}
        log_step(pl_module, logged, len(experience.rollouts), bar={"reward": metrics["reward/mean"]})
        draws = 1 + int(found.get("reward/refills", 0))
        self._subtitle = _subtitle(pl_module, experience, trainer.world_size, draws)
        step = step_number(trainer)
        for name in DRAWN:
            self._train[name].append(metrics[name])
        self._train["step"].append(step)
        if self.every_n_steps and (step + 1) % self.every_n_steps == 0:
            self._draw(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the validation reward and the held-out ones that the module logged."""
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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the whole run."""
        self._drawn = self._draw(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tells where the picture is: as the last words of a run, after the progress bar."""
        if stage == "fit":
            self._tell()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draws what there is of an interrupted or failed run."""
        self._drawn = self._draw(trainer)
        self._tell()  # Lightning calls no teardown after an exception

    def _tell(self) -> None:
        if self._drawn is not None:
            say(f"curves: {self._drawn}")
            self._drawn = None

    def _draw(self, trainer: Trainer) -> Path | None:
        if self._folder is None or not trainer.is_global_zero or not self._train["step"]:
            return None
        # Imported here because matplotlib takes a second to load and most commands never draw.
        from rlmt.report.curves import draw_curves

        with failing("curves"):
            return draw_curves(self._folder / "curves.png", self._train, self._validation, self._subtitle)
        return None


def _subtitle(pl_module: LightningModule, experience: Experience, world_size: int, draws: int) -> str:
    """Which run this is, from what the module is made of: algorithm, format and batch, of which `draws` were drawn."""
    rollouts = experience.rollouts
    algorithm: Any = getattr(pl_module, "algorithm", None)
    thinking: Any = getattr(pl_module, "format", None)
    parts = [type(algorithm).__name__] if algorithm is not None else []
    if thinking is not None:
        parts.append(f"format {thinking.name}")
    parts.append(f"{len(rollouts.prompts) // draws * world_size} prompts × {rollouts.group_size} samples a step")
    return " · ".join(parts)
