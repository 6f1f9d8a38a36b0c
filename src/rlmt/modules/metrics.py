"""The metrics of a training step: what rewards, lengths, the update and the clock come to, under their final names.

The modules log them with `self.log`; callbacks only read them.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MaxMetric, MeanMetric

from rlmt.distributed.collectives import all_gather_object, all_gather_tensor
from rlmt.errors import UserError
from rlmt.types import Experience

PROGRESS_BAR = {
    "reward/mean": "reward",
    "length/thought_mean": "thought",
    "policy/kl": "kl",
    "dpo/accuracy": "accuracy",
}
"""Metrics on the progress bar, and their names there."""


def length_metrics(experience: Experience) -> dict[str, float]:
    """Lengths of thoughts and responses in tokens. All ranks have to call it.

    Every sample of every rank counts, malformed ones too: a thought that never closes is all thought and no response.

    Args:
        experience: B scored samples.

    Returns:
        `length/{thought,response}_mean`, `length/{thought,response}_p95` (95th percentile, linear interpolation between
        samples), and `length/truncated`, the fraction of samples cut at the length limit.
    """
    metrics: dict[str, float] = {}
    for part, tokens in (("thought", experience.thought_tokens), ("response", experience.response_tokens)):
        tokens = all_gather_tensor(tokens.cpu().double())
        metrics[f"length/{part}_mean"] = float(tokens.mean())
        metrics[f"length/{part}_p95"] = float(torch.quantile(tokens, 0.95))
    metrics["length/truncated"] = float(all_gather_tensor(experience.truncated.double()).mean())
    return metrics


def reward_metrics(experience: Experience) -> dict[str, float]:
    """Statistics of the rewards of a rollout batch. All ranks have to call it.

    Standard deviations are those of the population (divided by n, not n - 1), so that a single sample has 0.

    Args:
        experience: B scored samples.

    Returns:
        `reward/mean` and `reward/std` over the samples; `reward/group_std`, the mean over prompts of the standard
        deviation within a prompt's samples; `reward/zero_std_groups`, the fraction of prompts whose samples all have
        the same reward, so that they have no learning signal; `reward/malformed`, the fraction of samples that break
        the format; and `reward/<name>` for each reward, the mean raw score over the samples it scored, NaN if it scored
        none. `reward/std` and `reward/<name>` are over all ranks, the others over this one.

    Raises:
        UserError: A reward has the name of one of these metrics.
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
            raise UserError(f"A reward is called {name!r}, which is the metric reward/{name}: give it another name.")
        metrics[f"reward/{name}"] = float(all_gather_tensor(scores.detach().cpu().double()).nanmean())
    return metrics


def evaluation_values(experience: Experience) -> dict[str, Tensor]:
    """The values of held-out samples, whose means are logged under `val/` or `test/`.

    Args:
        experience: B scored samples.

    Returns:
        `reward_mean`, `malformed` and `{thought,response}_tokens`, each [B] float32; and, if there are several rewards,
        the raw scores of each over the samples that it scored.
    """
    malformed = torch.tensor([not split.ok for split in experience.splits], dtype=torch.float32)
    values = {
        "reward_mean": experience.scores.total,
        "malformed": malformed,
        "thought_tokens": experience.thought_tokens.float(),
        "response_tokens": experience.response_tokens.float(),
    }
    parts = experience.scores.parts
    return values | {name: scores[scores.isfinite()] for name, scores in parts.items() if len(parts) > 1}


class UpdateMetrics:
    """Averages over the optimizer steps on one rollout batch.

    Values of tokens, samples and pairs are averaged over all of them (`_max` ones maximised); values of optimizer steps
    over the steps. They stay on their device until `compute`, since reading one would wait for the device.

    torchmetrics accumulates and merges; its own synchronisation is not used, since it takes two collectives for each
    state of each metric, and a rank without samples does not know every name.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, MeanMetric | MaxMetric] = {}
        self._steps: dict[str, MeanMetric] = {}

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Adds the values of a micro-batch.

        Args:
            values: Name → [n] one value per token, sample or pair.
        """
        for name, value in values.items():
            if name not in self._metrics:
                kind = MaxMetric if name.endswith("_max") else MeanMetric
                self._metrics[name] = kind(nan_strategy="disable", sync_on_compute=False).to(value.device)
            self._metrics[name].update(value)

    def update_step(self, values: Mapping[str, float]) -> None:
        """Adds the values of an optimizer step, the same on all ranks."""
        for name, value in values.items():
            if name not in self._steps:
                self._steps[name] = MeanMetric(nan_strategy="disable", sync_on_compute=False)
                self._steps[name].set_dtype(torch.float64)
            self._steps[name].update(torch.tensor(value, dtype=torch.float64))

    def compute(self) -> dict[str, float]:
        """Means and maxima over all ranks. All ranks have to call it."""
        merged: dict[str, MeanMetric | MaxMetric] = {}
        for metrics in all_gather_object({name: metric.cpu() for name, metric in self._metrics.items()}):
            for name, metric in metrics.items():
                first = merged.setdefault(name, metric)
                if first is not metric and isinstance(first, MaxMetric):
                    first.update(metric.compute())  # torchmetrics does not merge states of a MaxMetric
                elif first is not metric:
                    first.merge_state(metric)
        return {name: float(metric.compute()) for name, metric in (merged | self._steps).items()}


def response_metrics(experience: Experience) -> dict[str, float]:
    """Signs of reward hacking in the well-formed responses of a rollout batch. All ranks have to call it.

    Args:
        experience: B scored samples.

    Returns:
        `reward/length_correlation`, the correlation (Pearson) of reward and response length in tokens, both minus their
        mean over the prompt's responses, 0 where one of them does not vary; and `response/distinct_2`, the distinct
        pairs of neighbouring tokens of a response as a share of all its pairs (Li et al. 2016, arXiv 1510.03055),
        averaged over responses, NaN without any.
    """
    well_formed = torch.tensor([split.ok for split in experience.splits])
    rewards, group_of = experience.scores.total.detach().cpu().double(), experience.group.cpu()
    lengths = experience.response_tokens.cpu().double()
    deviations = [
        torch.stack([_deviations(rewards[rows]), _deviations(lengths[rows])], dim=1)
        for group in torch.unique(group_of)
        if (rows := well_formed & (group_of == group)).any()
    ]
    gathered = all_gather_tensor(torch.cat([*deviations, torch.empty(0, 2, dtype=torch.float64)]))
    norm = float(gathered.norm(dim=0).prod())
    starts = experience.thought_tokens.tolist()
    completions = experience.rollouts.completion_ids
    responses = [completions[i][starts[i] :] for i in well_formed.nonzero().flatten().tolist()]
    shares = torch.tensor([distinct_pairs(ids) for ids in responses if len(ids) > 1], dtype=torch.float64)
    return {
        "reward/length_correlation": float(gathered.prod(dim=1).sum()) / norm if norm else 0.0,
        "response/distinct_2": float(all_gather_tensor(shares).mean()),
    }


def _deviations(values: Tensor) -> Tensor:
    """Values minus their mean; exactly 0 if all are equal."""
    return torch.zeros_like(values) if bool((values == values[0]).all()) else values - values.mean()


def distinct_pairs(ids: Sequence[int]) -> float:
    """Distinct pairs of neighbouring tokens, as a share of the pairs of at least two tokens."""
    tokens = np.asarray(ids, dtype=np.int64)
    return len(np.unique((tokens[:-1] << 32) + tokens[1:])) / (len(tokens) - 1)


def with_effective_sample_size(metrics: dict[str, float]) -> dict[str, float]:
    """Replaces the mean square of importance weights w by their effective sample size, (Σ w)² / (n Σ w²).

    It is the share of the n tokens that, unweighted, would estimate the gradient as precisely (Kong, 1992): 1 if all
    weights are equal.
    """
    square = metrics.pop("engine/importance_square", None)
    if square is not None:
        metrics["engine/effective_sample_size"] = metrics["engine/importance_mean"] ** 2 / square
    return metrics


class StepTimer:
    """Measures the seconds of training steps, each from the end of the step before, validation left out.

    So a step includes the loading of its batch. The first step includes the start of the engine.
    """

    def __init__(self) -> None:
        self._began = self._paused = 0.0

    def start(self) -> None:
        """Begins the first step."""
        self._began = time.perf_counter()

    def pause(self) -> None:
        """Stops the clock, for a validation."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Starts the clock again where it stopped."""
        self._began += time.perf_counter() - self._paused

    def step(self, began: float, scored: float, generated: Experience) -> dict[str, float]:
        """Ends a step and begins the next one.

        Args:
            began: Clock when the generation of the step's rollouts began.
            scored: Clock when all rollouts were scored.
            generated: The rollouts.

        Returns:
            `time/{rollout,sync,reward,update,step}_s`; `perf/tokens_per_s`, the sampled tokens per second of the whole
            step; and `perf/memory_gib`, the peak memory of this process so far.
        """
        now = time.perf_counter()
        phases = generated.rollouts.seconds
        phases = phases | {"reward": scored - began - sum(phases.values()), "update": now - scored}
        phases["step"], self._began = now - self._began, now
        metrics = {f"time/{phase}_s": seconds for phase, seconds in phases.items()}
        tokens_per_s = float(generated.lengths.sum()) / phases["step"]
        return metrics | {"perf/tokens_per_s": tokens_per_s, "perf/memory_gib": peak_memory_gib()}


def peak_memory_gib() -> float:
    """Peak memory of this process since its start in GiB: torch's on the GPU, or else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def step_metrics(generated: Experience, trained: Experience) -> dict[str, float]:
    """What a rollout batch comes to, apart from the update. All ranks have to call it.

    Args:
        generated: All samples of the step.
        trained: Those that are trained on; with dynamic sampling they can be fewer.
    """
    metrics = reward_metrics(generated) | length_metrics(generated) | response_metrics(generated)
    metrics["engine/weight_version"] = float(trained.rollouts.weight_version)
    if trained.rollouts.lag is not None:
        metrics["engine/weight_lag"] = float(trained.rollouts.lag)
    return metrics | trained.metrics
