"""Whether the policy learns soundly: its losses, its drift, and how far the engine is from the trainer."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from rlmt.ranges import FloatAboveOne, PositiveFloat, check_ranges
from rlmt.types import Experience

from ._common import experience_of, log_step, metrics_of, over_ranks

PREFIXES = ("policy/", "engine/", "critic/", "dpo/")
"""Families of metrics that this callback logs; those of time are `Throughput`'s."""
SHOWN = {"policy/kl": "kl", "dpo/accuracy": "accuracy"}
"""Metrics on the progress bar, and their names there."""
NO_PAIR = ("malformed", "margin", "length")
"""Why a prompt has no pair, as counted in dpo/skipped_…"""


class PolicyHealth(Callback):
    """Logs what the update found: every metric of the step under policy/, engine/, critic/ and dpo/.

    The progress bar shows `policy/kl` as `kl` and `dpo/accuracy` as `accuracy`. Four kinds of trouble warn once a run:
    engine and trainer that disagree on the log-prob of a token, a policy that runs away within one rollout, one that
    does not know the format, and a step of DPO without a pair.

    Args:
        max_mismatch: Warn when a token's log-prob under the engine and under the trainer differ by more, in nats.
        max_ratio: Warn when a token's probability ratio to the policy that sampled it is larger.

    Raises:
        UserError: `max_mismatch` is not positive, or `max_ratio` not above 1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from rlmt.callbacks import PolicyHealth
        >>> health = PolicyHealth(max_mismatch=0.5)
        >>> trainer = Trainer(callbacks=[health], logger=False, accelerator="cpu")
    """

    def __init__(self, max_mismatch: PositiveFloat = 1.0, max_ratio: FloatAboveOne = 10.0) -> None:
        check_ranges(PolicyHealth, locals())
        self.max_mismatch = max_mismatch
        self.max_ratio = max_ratio
        self._warned: set[str] = set()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the step's metrics and warns of trouble."""
        experience = experience_of(outputs)
        found = {name: value for name, value in metrics_of(outputs).items() if name.startswith(PREFIXES)}
        metrics = over_ranks(trainer, pl_module, found)
        bar = {short: metrics[name] for name, short in SHOWN.items() if name in metrics}
        log_step(pl_module, metrics, len(experience.rollouts), bar=bar)
        self._look_for_trouble(metrics)
        self._look_for_form(experience)

    def _look_for_trouble(self, metrics: dict[str, float]) -> None:
        mismatch = metrics.get("engine/mismatch_max", 0.0)
        if not mismatch <= self.max_mismatch:
            self._warn(
                "engine/mismatch_max",
                f"engine/mismatch_max is {mismatch:.3g} nats: the engine and the trainer disagree on what was sampled;"
                " give them the same precision, and keep --data.top_p at 1 (PolicyHealth.max_mismatch sets this limit)",
            )
        ratio = metrics.get("policy/ratio_max", 1.0)
        if not ratio <= self.max_ratio:
            self._warn(
                "policy/ratio_max",
                f"policy/ratio_max is {ratio:.3g}: the policy runs away within one rollout; lower the learning rate or"
                " --model.algorithm.update_epochs (PolicyHealth.max_ratio sets this limit)",
            )

        if metrics.get("dpo/pairs") == 0:
            why = ", ".join(f"{metrics[f'dpo/skipped_{reason}']:g} {reason}" for reason in NO_PAIR)
            self._warn(
                "dpo/pairs",
                f"no prompt of a step has a pair to learn from (skipped: {why}); look at the samples, and at"
                " --model.algorithm.min_valid, min_margin and max_tokens",
            )

    def _look_for_form(self, experience: Experience) -> None:
        if any(split.ok for split in experience.splits):
            return
        (status, count), *_ = Counter(split.status for split in experience.splits).most_common()
        self._warn(
            "malformed",
            f"all {len(experience.splits)} samples of a step are malformed ({count} {status}), so there is nothing to"
            " learn from: warm-start the policy on the format, tell it the format (--config instructed), or raise"
            " --data.max_new_tokens",
        )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(message)
