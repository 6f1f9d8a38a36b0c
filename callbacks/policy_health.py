"""Warnings about a run: engine and trainer disagree, a policy diverges or over-optimises, samples without a signal."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from rlmt.options import FloatAboveOne, PositiveFloat, PositiveInt, check_ranges
from rlmt.report.verdicts import MAX_MISMATCH
from rlmt.types import Experience

from ._common import experience_of, step_metrics

NO_PAIR = ("malformed", "margin", "length")
"""Reasons why a prompt has no pair, counted in `dpo/skipped_<reason>`."""


class PolicyHealth(Callback):
    """Warns once per run of each of five problems, from the metrics that the module logs.

    Engine and trainer disagree on the log-prob of a token; the policy diverges within one rollout batch; all samples of
    a step are malformed; a step of DPO has no pair; a held-out reward falls from validation to validation while the
    reward rises.

    Args:
        max_mismatch: Largest difference in nats between a token's log-prob under the engine and under the trainer that
            does not warn.
        max_ratio: Largest probability ratio of a token to the policy that sampled it that does not warn.
        validations: Validations in a row in which a held-out reward falls before it warns, if the reward has risen over
            them.

    Raises:
        UserError: `max_mismatch` or `validations` is not positive, or `max_ratio` not above 1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import PolicyHealth
        >>> health = PolicyHealth(max_mismatch=0.5)
        >>> trainer = Trainer(callbacks=[health], logger=False, accelerator="cpu")
    """

    def __init__(
        self, max_mismatch: PositiveFloat = MAX_MISMATCH, max_ratio: FloatAboveOne = 10.0, validations: PositiveInt = 3
    ) -> None:
        check_ranges(PolicyHealth, locals())
        self.max_mismatch = max_mismatch
        self.max_ratio = max_ratio
        self.validations = validations
        self._warned: set[str] = set()
        self._history: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """The scores of the last validations."""
        return {"history": self._history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the scores of the last validations."""
        self._history = list(state_dict.get("history", []))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Checks the step's metrics and samples."""
        self._check_metrics(step_metrics(trainer, outputs))
        self._check_format(experience_of(outputs))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the reward and the held-out rewards with those of earlier validations."""
        held_out: Any = getattr(pl_module, "held_out", None)
        if not held_out or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        names = ("reward_mean", *held_out.names)
        logged = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in names}
        self._history = [*self._history, logged][-self.validations - 1 :]
        first, last = self._history[0], self._history[-1]
        if len(self._history) <= self.validations or not first["reward_mean"] < last["reward_mean"]:
            return
        for name in held_out.names:
            scores = [row.get(name, math.nan) for row in self._history]  # a resumed run may have a new reward
            if all(after < before for before, after in pairwise(scores)):
                self._warn(
                    f"val/{name}",
                    f"val/{name} fell from {first[name]:.3g} to {last[name]:.3g} in {self.validations} validations in a"
                    f" row while val/reward_mean rose from {first['reward_mean']:.3g} to {last['reward_mean']:.3g}: the"
                    " policy over-optimises the reward. Stop, or use an earlier checkpoint (--config early_stop).",
                )

    def _check_metrics(self, metrics: dict[str, float]) -> None:
        mismatch = metrics.get("engine/mismatch_max", 0.0)
        if not mismatch <= self.max_mismatch:
            self._warn(
                "engine/mismatch_max",
                f"engine/mismatch_max is {mismatch:.3g} nats: engine and trainer disagree on the log-prob of a token."
                " Use the same precision for both, and keep --data.top_p at 1 (limit: PolicyHealth.max_mismatch).",
            )
        ratio = metrics.get("policy/ratio_max", 1.0)
        if not ratio <= self.max_ratio:
            self._warn(
                "policy/ratio_max",
                f"policy/ratio_max is {ratio:.3g}: the policy diverges within one rollout batch. Lower the learning"
                " rate or --model.algorithm.update_epochs (PolicyHealth.max_ratio sets this limit).",
            )

        if metrics.get("dpo/pairs") == 0:
            why = ", ".join(f"{metrics[f'dpo/skipped_{reason}']:g} {reason}" for reason in NO_PAIR)
            self._warn(
                "dpo/pairs",
                f"no prompt of a step has a pair to train on (skipped: {why}). Check the samples, and"
                " --model.algorithm.min_valid, min_margin and max_tokens.",
            )

    def _check_format(self, experience: Experience) -> None:
        if any(split.ok for split in experience.splits):
            return
        (status, count), *_ = Counter(split.status for split in experience.splits).most_common()
        self._warn(
            "malformed",
            f"all {len(experience.splits)} samples of a step are malformed ({count} {status}), so there is no"
            " learning signal. Warm-start the policy on the format, describe the format in the prompt (--config"
            " instructed), or raise --data.max_new_tokens.",
        )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(message)
