"""Metrics that a run logs, by name, to check at its start what EarlyStopping and ModelCheckpoint monitor.

Lightning raises an error of its own, but only when the metric is due: after models were loaded, and steps taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from rlmt.errors import UserError
from rlmt.modules.metrics import PROGRESS_BAR

METRICS = {
    "RLMTModule": """
        reward/mean reward/std reward/group_std reward/zero_std_groups reward/malformed reward/length_correlation
        reward/refills reward/dropped_groups reward/surplus_groups reward/overlong_penalty response/distinct_2
        length/thought_mean length/thought_p95 length/response_mean length/response_p95 length/truncated
        policy/loss policy/kl policy/entropy policy/approx_kl policy/clip_low policy/clip_high policy/ratio_max
        policy/grad_norm policy/skipped policy/lr policy/kl_coef policy/completion_kl
        engine/mismatch_kl engine/mismatch_max engine/weight_version engine/weight_lag engine/importance_mean
        engine/importance_capped engine/effective_sample_size
        critic/loss critic/grad_norm critic/clip_frac critic/explained_variance critic/lr
        dpo/accuracy dpo/margin dpo/chosen_reward dpo/rejected_reward dpo/chosen_logprobs dpo/rejected_logprobs
        dpo/pairs dpo/skipped_malformed dpo/skipped_margin dpo/skipped_length
        time/rollout_s time/sync_s time/reward_s time/update_s time/step_s perf/tokens_per_s
        perf/memory_gib val/reward_mean val/malformed val/thought_tokens val/response_tokens""",
    "SFT": "sft/loss sft/grad_norm sft/tokens sft/lr val/loss",
    "RewardModeling": """
        rm/loss rm/ranking_loss rm/accuracy rm/difference rm/grad_norm rm/lr
        val/loss val/accuracy val/calibration_error""",
}
"""Kind of module → names in docs/reference/metrics.md, without those that contain the name of a reward or subset."""
_ON_THE_BAR = {"RLMTModule": PROGRESS_BAR.values(), "SFT": ["loss"], "RewardModeling": ["acc"]}
"""Kind of module → names on the progress bar, which can be monitored, too; so can the counters of `ModelCheckpoint`."""
_PACKAGES = ("rlmt", "lightning", "torch")
"""Packages whose classes are not the user's."""


def check_monitors(trainer: Trainer) -> None:
    """Checks that callbacks monitor metrics that the run logs.

    A callback that logs metrics names them in `metric_names`. A run with a module, objective or callback of the user's
    own may log others, so there is nothing to check.

    Args:
        trainer: A trainer with its module attached.

    Raises:
        UserError: A callback monitors another metric; the message lists the nearest names.
    """
    module: Any = trainer.lightning_module
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(_is_own(part) for part in (module, getattr(module, "algorithm", module), *callbacks)):
        return
    names = [*logged_names(module), *(name for each in callbacks for name in getattr(each, "metric_names", ()))]
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is None or monitor in {*names, *_ON_THE_BAR[module.kind]} or _is_lenient(callback, module):
            continue
        close = get_close_matches(monitor, names, 3, 0.5) or [name for name in names if monitor.lower() in name][:3]
        fix = f"use one of {', '.join(close)}" if close else "use a column of metrics.csv"
        raise UserError(f"{type(callback).__name__}.monitor: the run logs no metric {monitor!r}; {fix}.")


def logged_names(module: Any) -> list[str]:
    """Names of the metrics that a training run of a module logs.

    Args:
        module: An RLMTModule, SFT or RewardModeling.
    """
    names = METRICS[module.kind].split()
    algorithm = getattr(module, "algorithm", None)
    if algorithm is None:
        return names
    absent = [*(["critic/"] if algorithm.critic is None else []), *([] if algorithm.selects else ["dpo/"])]
    names = [name for name in names if not name.startswith(tuple(absent))]
    return [*names, *_reward_names(module)]


def _reward_names(module: Any) -> Iterable[str]:
    """Names that contain the name of a reward."""
    parts = module.reward.part_names
    yield from (f"reward/{part}" for part in parts)
    yield from (f"val/{part}" for part in parts if len(parts) > 1)
    yield from (f"val/{name}" for name in module.held_out.names)


def _is_lenient(callback: Any, module: Any) -> bool:
    """Whether a callback accepts a metric that is absent, or monitors one whose name only the data have."""
    if isinstance(callback, EarlyStopping) and not callback.strict:
        return True
    if isinstance(callback, ModelCheckpoint) and callback.monitor in ("step", "epoch"):
        return True
    return module.kind == "RewardModeling" and str(callback.monitor).rpartition("/")[0] == "val/accuracy"


def _is_own(part: object) -> bool:
    """Whether an object's class is the user's."""
    return type(part).__module__.partition(".")[0] not in _PACKAGES
