"""The panels of curves: which metrics share one, their titles and their units."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rlmt.report.verdicts import CHECKS

FAMILIES = {
    "reward": "Reward",
    "val": "Held-out data",
    "length": "Length",
    "policy": "Policy",
    "dpo": "DPO pairs",
    "critic": "Critic",
    "engine": "Engine",
    "sft": "Supervised fine-tuning",
    "rm": "Reward modeling",
    "response": "Response",
    "time": "Time",
    "perf": "Throughput and memory",
}
"""Prefix of metric names → heading, in the order of the page; others follow."""

_SHARE, _TOKENS, _NATS, _SECONDS = "share, 0 to 1", "tokens", "nats", "seconds"


@dataclass(frozen=True)
class Line:
    """One metric of a panel."""

    metric: str
    label: str


@dataclass(frozen=True)
class Panel:
    """One chart."""

    family: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    watch: float | None = None
    """Threshold of the verdict on this metric, if it compares the metric itself."""
    problem: float | None = None


_PANELS: tuple[tuple[str, str, str, tuple[tuple[str, str], ...]], ...] = (
    ("reward", "Reward", "reward", (("reward/mean", "training"), ("val/reward_mean", "held-out prompts"))),
    ("reward", "Spread of the reward", "reward", (("reward/std", "all samples"), ("reward/group_std", "of a prompt"))),
    ("reward", "Prompts without a signal", _SHARE, (("reward/zero_std_groups", "zero-std groups"),)),
    ("reward", "Malformed samples", _SHARE, (("reward/malformed", "training"), ("val/malformed", "held-out"))),
    ("reward", "Reward against length", "correlation", (("reward/length_correlation", "within prompts"),)),
    ("length", "Thought", _TOKENS, (("length/thought_mean", "mean"), ("length/thought_p95", "95th percentile"),
                                    ("val/thought_tokens", "held-out mean"))),
    ("length", "Response", _TOKENS, (("length/response_mean", "mean"), ("length/response_p95", "95th percentile"),
                                     ("val/response_tokens", "held-out mean"))),
    ("length", "Truncated samples", _SHARE, (("length/truncated", "truncated"),)),
    ("policy", "KL to the reference", "nats per token", (("policy/kl", "KL"),)),
    ("policy", "Entropy", "nats per token", (("policy/entropy", "entropy"),)),
    ("policy", "KL to the sampling policy", "nats per token", (("policy/approx_kl", "KL"),)),
    ("policy", "Clipped tokens", _SHARE, (("policy/clip_low", "low"), ("policy/clip_high", "high"))),
    ("policy", "Largest probability ratio", "ratio", (("policy/ratio_max", "ratio"),)),
    ("policy", "Loss", "loss", (("policy/loss", "loss"),)),
    ("policy", "Gradient norm", "norm before clipping", (("policy/grad_norm", "norm"),)),
    ("policy", "Skipped optimizer steps", _SHARE, (("policy/skipped", "skipped"),)),
    ("policy", "Learning rate", "learning rate", (("policy/lr", "policy"), ("critic/lr", "critic"))),
    ("dpo", "Accuracy of pairs", _SHARE, (("dpo/accuracy", "accuracy"),)),
    ("dpo", "Implicit rewards", "nats × beta", (("dpo/margin", "margin"), ("dpo/chosen_reward", "chosen"),
                                                ("dpo/rejected_reward", "rejected"))),
    ("dpo", "Log-probs of pairs", _NATS, (("dpo/chosen_logprobs", "chosen"), ("dpo/rejected_logprobs", "rejected"))),
    ("dpo", "Pairs", "prompts a step", (("dpo/pairs", "pairs"), ("dpo/skipped_malformed", "malformed"),
                                        ("dpo/skipped_margin", "margin"), ("dpo/skipped_length", "length"))),
    ("critic", "Explained variance", "up to 1", (("critic/explained_variance", "critic"),)),
    ("engine", "Engine against trainer", _NATS, (("engine/mismatch_max", "largest gap of a token"),)),
    ("engine", "Engine against trainer, KL", "nats per token", (("engine/mismatch_kl", "KL"),)),
    ("sft", "Loss", "nats per token", (("sft/loss", "training"), ("val/loss", "held-out"))),
    ("sft", "Trained tokens", "tokens a step", (("sft/tokens", "tokens"),)),
    ("rm", "Loss", _NATS, (("rm/loss", "training"), ("rm/ranking_loss", "ranking"), ("val/loss", "held-out"))),
    ("rm", "Accuracy", _SHARE, (("rm/accuracy", "training"), ("val/accuracy", "held-out"))),
    ("response", "Distinct pairs of tokens", _SHARE, (("response/distinct_2", "distinct"),)),
    ("time", "Seconds of a step", _SECONDS, (("time/rollout_s", "rollout"), ("time/reward_s", "reward"),
                                             ("time/update_s", "update"), ("time/sync_s", "sync"))),
    ("time", "Whole step", _SECONDS, (("time/step_s", "step"),)),
    ("perf", "Throughput", "tokens per second", (("perf/tokens_per_s", "sampled tokens"),)),
    ("perf", "Peak memory", "GiB", (("perf/memory_gib", "process or device"),)),
)  # fmt: skip

_FOLLOWERS = {"val/reward_mean", "val/malformed", "val/thought_tokens", "val/response_tokens", "critic/lr"}
"""Metrics that accompany another one and have no panel of their own."""

_LIMITS = {
    "policy/kl": "kl",
    "reward/malformed": "malformed",
    "length/truncated": "truncated",
    "reward/zero_std_groups": "zero_signal",
    "engine/mismatch_max": "mismatch",
}
"""Metric → the check that compares it with its thresholds directly."""


def panels(logged: Collection[str]) -> list[Panel]:
    """The panels of the metrics that were logged, in the order of the page.

    Args:
        logged: Names of metrics.

    Returns:
        Known panels with the lines that were logged, and one panel for each other metric.
    """
    logged = set(logged)
    found = [
        _panel(family, title, unit, lines)
        for family, title, unit, all_lines in _PANELS
        if (lines := [Line(*line) for line in all_lines if line[0] in logged]) and not _only_followers(lines, family)
    ]
    shown = {line.metric for panel in found for line in panel.lines}
    for metric in sorted(logged - shown):
        family, _, name = metric.partition("/")
        unit = _SECONDS if metric.endswith("_s") else "reward" if family in ("reward", "val") else "value"
        found.append(_panel(family, (name or family).replace("_", " "), unit, [Line(metric, name or family)]))
    order = list(FAMILIES)
    rank = {panel.family: order.index(panel.family) if panel.family in order else len(order) for panel in found}
    return sorted(found, key=lambda panel: rank[panel.family])


def _only_followers(lines: Sequence[Line], family: str) -> bool:
    """Whether a panel would show accompanying metrics alone, as after `rlmt validate`."""
    return family != "val" and all(line.metric in _FOLLOWERS or line.metric == "val/loss" for line in lines)


def _panel(family: str, title: str, unit: str, lines: Sequence[Line]) -> Panel:
    check = next((c for c in CHECKS for line in lines if _LIMITS.get(line.metric) == c.key), None)
    limits = (None, None) if check is None else (check.watch, check.problem)
    return Panel(family, title, unit, tuple(lines), *limits)
