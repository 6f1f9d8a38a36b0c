"""The verdicts on a run: checks of its metrics against stated thresholds.

Each check turns metrics into one number, the larger the worse, with two thresholds. They are rules of thumb from the
tests, the miniature study and the paper's settings: they say where to look, not what is right. `CHECKS` is their only
source; the documentation prints its table from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from rlmt.report.series import MIN_STEPS, Metrics, Series

MAX_MISMATCH = 1.0
"""Gap in nats between engine and trainer, above which `PolicyHealth` warns and the verdict is a problem."""
FLOAT32_MISMATCH = 0.01
"""The gap to watch where both compute in float32."""
_KNOWN_VALIDATION = {f"val/{name}" for name in ("reward_mean", "malformed", "thought_tokens", "response_tokens")}


class State(StrEnum):
    """What a check found, from good to bad; `UNKNOWN` if there is nothing to check yet."""

    OK = "ok"
    UNKNOWN = "unknown"
    WATCH = "watch"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Reading:
    """The number of a check on one run."""

    badness: float | None
    """Compared with the thresholds; None if the run does not have the metrics yet."""
    text: str
    """The number with its unit, as shown."""
    metric: str
    """The metric whose curve shows it."""


@dataclass(frozen=True)
class Check:
    """One check: its thresholds and what to say."""

    key: str
    title: str
    measures: str
    """What the compared number is."""
    watch: float
    problem: float
    why: str
    advice: str
    anchor: str
    """Page and heading of the documentation."""
    read: Callable[[Metrics], Reading | None]
    """None if the check does not apply to the run."""


@dataclass(frozen=True)
class Verdict:
    """The result of one check."""

    check: Check
    state: State
    reading: Reading


def mean_of(series: Series) -> float:
    """Mean of the last window."""
    return float(series.last.mean())


def welch_t(series: Series) -> float:
    """Change from the first to the last window in standard errors (Welch's t); infinite without noise."""
    before, after = series.first, series.last
    error = math.sqrt(before.var(ddof=1) / len(before) + after.var(ddof=1) / len(after))
    change = float(after.mean() - before.mean())
    return change / error if error else math.copysign(math.inf, change) if change else 0.0


def _tail(metrics: Metrics, names: Sequence[str], text: str, worst: bool = False) -> Reading | None:
    """Mean (or maximum) of the sum of metrics over the last window."""
    found = [metrics[name] for name in names if name in metrics]
    if not found:
        return None
    if min(map(len, found)) < MIN_STEPS:
        return Reading(None, f"judged from step {MIN_STEPS} on", names[0])
    value = sum(float(series.last.max()) if worst else mean_of(series) for series in found)
    return Reading(value, text.format(value), names[0])


def _reward_trend(metrics: Metrics) -> Reading | None:
    series = metrics.get("reward/mean")
    if series is None:
        return None
    if len(series) < MIN_STEPS:
        return Reading(None, f"judged from step {MIN_STEPS} on", "reward/mean")
    text = f"{series.first.mean():.3g} → {series.last.mean():.3g}"
    return Reading(-welch_t(series), text, "reward/mean")


def held_out_metrics(metrics: Metrics) -> list[str]:
    """Validation metrics of rewards: the held-out rewards, or else the reward on held-out prompts."""
    others = [name for name in metrics if name.startswith("val/") and name not in _KNOWN_VALIDATION]
    trained = {f"val/{name.removeprefix('reward/')}" for name in metrics if name.startswith("reward/")}
    return [name for name in others if name not in trained] or [n for n in ("val/reward_mean",) if n in metrics]


def _held_out(metrics: Metrics) -> Reading | None:
    """The largest share of its range that a held-out reward lost since its best, while the reward did not fall."""
    reward = metrics.get("reward/mean")
    if reward is None:
        return None
    readings = [_lost(name, metrics[name], reward) for name in held_out_metrics(metrics)]
    if not readings:
        return Reading(None, "no validation yet", "reward/mean")
    return max(readings, key=lambda reading: -1.0 if reading.badness is None else reading.badness)


def _lost(name: str, held_out: Series, reward: Series) -> Reading:
    """The reading of one held-out reward."""
    if len(held_out) < 3:
        return Reading(None, f"{len(held_out)} of 3 validations", name)
    best = int(held_out.values.argmax())
    span = float(np.ptp(held_out.values))
    lost = float(held_out.values[best] - held_out.values[-1])
    text = f"{held_out.values[-1]:.3g} now, {held_out.values[best]:.3g} at best (step {held_out.steps[best]:.0f})"
    before = reward.values[reward.steps <= held_out.steps[best]][-reward.window :]
    rises = bool(len(before)) and mean_of(reward) > float(before.mean())
    return Reading(lost / span if span and rises else 0.0, text, name)


def _entropy(metrics: Metrics) -> Reading | None:
    series = metrics.get("policy/entropy")
    if series is None:
        return None
    if len(series) < MIN_STEPS:
        return Reading(None, f"judged from step {MIN_STEPS} on", "policy/entropy")
    before, after = float(series.first[0]), mean_of(series)
    return Reading(1 - after / before if before > 0 else 0.0, f"{before:.3g} → {after:.3g} nats", "policy/entropy")


def _lengths(metrics: Metrics) -> Reading | None:
    """The factor by which responses grew or shrank, or thoughts shrank."""
    response, thought = metrics.get("length/response_mean"), metrics.get("length/thought_mean")
    if response is None:
        return None
    if len(response) < MIN_STEPS:
        return Reading(None, f"judged from step {MIN_STEPS} on", "length/response_mean")
    text = f"response {response.first.mean():.0f} → {response.last.mean():.0f}"
    factor = float(response.last.mean() / max(response.first.mean(), 1.0))
    readings = [(max(factor, 1 / max(factor, 1e-9)), "length/response_mean")]
    if thought is not None and thought.first.mean() > 0:
        text += f", thought {thought.first.mean():.0f} → {thought.last.mean():.0f}"
        readings.append((float(thought.first.mean() / max(thought.last.mean(), 1e-9)), "length/thought_mean"))
    badness, metric = max(readings)
    return Reading(badness, f"{text} tokens", metric)


def _loss(metrics: Metrics) -> Reading | None:
    """Share by which the held-out loss of a supervised run exceeds its lowest value."""
    series = metrics.get("val/loss")
    if series is None:
        return None
    if len(series) < 2:
        return Reading(None, "1 of 2 validations", "val/loss")
    lowest = float(series.values.min())
    text = f"{series.values[-1]:.3g} now, {lowest:.3g} at its lowest"
    return Reading(float(series.values[-1]) / lowest - 1 if lowest > 0 else 0.0, text, "val/loss")


_CURVES = "concepts/curves.md"

CHECKS: tuple[Check, ...] = (
    Check(
        "reward_trend", "Reward", "standard errors by which the reward fell from the first to the last fifth of steps",
        -2.0, 2.0, "Training pushes this number up. If it does not rise, the run has learned nothing yet.",
        "Flat: a higher learning rate, a larger --data.group_size, or prompts on which samples differ. Falling: a lower"
        " learning rate.",
        f"{_CURVES}#other-patterns", _reward_trend,
    ),
    Check(
        "held_out", "Held-out reward", "share of its range that a held-out reward lost since its best, while the"
        " training reward rose",
        0.25, 0.5, "A policy that gains on the trained reward and loses on others exploits the reward model.",
        "Go back to the checkpoint of the best validation; train with --config early_stop and"
        " --model.held_out_rewards.",
        f"{_CURVES}#the-reward-is-over-optimised", _held_out,
    ),
    Check(
        "kl", "Distance to the reference", "policy/kl in nats per token", 0.1, 1.0,
        "Far from the initial policy, text gets unnatural and the reward model is asked about text it does not know.",
        "A lower learning rate, a higher --model.algorithm.kl_coef, fewer steps.",
        f"{_CURVES}#the-learning-rate-is-too-high",
        lambda metrics: _tail(metrics, ["policy/kl"], "{:.3g} nats per token"),
    ),
    Check(
        "entropy", "Entropy", "share of the first step's policy/entropy that is lost", 0.7, 0.9,
        "A policy without entropy writes one text for a prompt: it no longer explores, and nothing can be compared.",
        "A lower learning rate, a higher --model.algorithm.entropy_coef, an earlier checkpoint.",
        f"{_CURVES}#the-learning-rate-is-too-high", _entropy,
    ),
    Check(
        "clip", "Clipped tokens", "policy/clip_low + policy/clip_high", 0.2, 0.4,
        "Clipped tokens have no gradient: the policy moved too far within one rollout batch.",
        "A lower learning rate, or fewer updates a rollout (--model.algorithm.update_epochs, minibatches).",
        f"{_CURVES}#other-patterns",
        lambda metrics: _tail(metrics, ["policy/clip_low", "policy/clip_high"], "{:.1%} of tokens"),
    ),
    Check(
        "malformed", "Malformed samples", "reward/malformed", 0.05, 0.25,
        "A malformed sample gets a fixed reward and no score, so its text teaches only the format.",
        "Warm-start the format with SFT, or use --config instructed; a --model.malformed_reward below bad answers.",
        f"{_CURVES}#other-patterns",
        lambda metrics: _tail(metrics, ["reward/malformed"], "{:.1%} of samples"),
    ),
    Check(
        "truncated", "Truncated samples", "length/truncated", 0.05, 0.25,
        "A sample cut at the limit is scored without its end, and its thought may never close.",
        "A higher --data.max_new_tokens; if responses only grow, the reward pays for length:"
        " --model.algorithm.overlong_penalty 1.",
        f"{_CURVES}#the-length-limit-is-the-optimum",
        lambda metrics: _tail(metrics, ["length/truncated"], "{:.1%} of samples"),
    ),
    Check(
        "zero_signal", "Prompts without a signal", "reward/zero_std_groups", 0.3, 0.8,
        "If all samples of a prompt get one reward, their advantages are 0: the prompt costs time and changes nothing.",
        "A higher --data.temperature, a larger --data.group_size, --model.algorithm.dynamic_sampling, other prompts.",
        f"{_CURVES}#is-my-run-healthy",
        lambda metrics: _tail(metrics, ["reward/zero_std_groups"], "{:.1%} of prompts"),
    ),
    Check(
        "mismatch", "Engine against trainer",
        f"maximum of engine/mismatch_max in nats (in float32, watch above {FLOAT32_MISMATCH:g})",
        0.5, MAX_MISMATCH, "Samples come from another policy than the one that is trained: the gradient is biased.",
        "The same dtype in engine and trainer, --data.top_p 1.",
        f"{_CURVES}#other-patterns",
        lambda metrics: _tail(metrics, ["engine/mismatch_max"], "{:.2g} nats at most", worst=True),
    ),
    Check(
        "length_drift", "Lengths", "factor by which responses grew or shrank, or thoughts shrank", 2.0, 4.0,
        "Responses that only get longer often exploit the reward; thoughts that vanish say that thinking does not pay.",
        "Read samples; look at reward/length_correlation; --model.algorithm.overlong_penalty 1, or a better reward.",
        f"{_CURVES}#the-length-limit-is-the-optimum", _lengths,
    ),
    Check(
        "held_out_loss", "Held-out loss", "share by which val/loss exceeds its lowest value", 0.02, 0.1,
        "A held-out loss that rises while the training loss falls is over-fitting.",
        "Fewer epochs, more rows, a lower learning rate; the checkpoint of the lowest val/loss.",
        "reference/metrics.md#sft-and-reward-models", _loss,
    ),
)  # fmt: skip
"""All checks, in the order in which they are shown."""


def judge(check: Check, metrics: Metrics) -> Verdict | None:
    """Applies one check; None if it does not apply to the run."""
    reading = check.read(metrics)
    if reading is None:
        return None
    if reading.badness is None:
        return Verdict(check, State.UNKNOWN, reading)
    problem, watch = reading.badness >= check.problem, reading.badness > check.watch
    return Verdict(check, State.PROBLEM if problem else State.WATCH if watch else State.OK, reading)


def verdicts(metrics: Metrics, float32: bool = False) -> list[Verdict]:
    """Applies every check that concerns a run.

    Args:
        metrics: The run's metrics.
        float32: Whether engine and trainer compute in float32, so that they must agree closely.
    """
    strict = float32 and "engine/importance_mean" not in metrics  # the engine rounds its weights on purpose
    checks = [replace(c, watch=FLOAT32_MISMATCH) if strict and c.key == "mismatch" else c for c in CHECKS]
    return [verdict for check in checks if (verdict := judge(check, metrics)) is not None]


def worst(found: Sequence[Verdict]) -> State:
    """The worst state of several verdicts; unknown without any, and while none is known."""
    order = list(State)
    states = [verdict.state for verdict in found if verdict.state is not State.UNKNOWN]
    return max(states, key=order.index) if states else State.UNKNOWN


def threshold_table() -> str:
    """The checks as a Markdown table for the documentation."""
    rows = ["| verdict | number | watch | problem |", "|---|---|---|---|"]
    for check in CHECKS:
        rows.append(f"| {check.title} | {check.measures} | above {check.watch:g} | from {check.problem:g} |")
    return "\n".join(rows)
