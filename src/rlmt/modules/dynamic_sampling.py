"""Dynamic sampling (DAPO, arXiv 2503.14476, sec. 3.2): replaces groups of equal rewards by groups of fresh prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlmt.distributed.collectives import all_gather_object
from rlmt.types import Experience, RolloutBatch, Scores


def resample(first: Experience, max_refills: int, generate: Callable[[], Experience]) -> tuple[Experience, Experience]:
    """Generates batches for fresh prompts until as many groups as in `first` have rewards that differ.

    Args:
        first: The step's own batch, scored.
        max_refills: Maximum number of batches to generate in addition.
        generate: Generates and scores the next batch with the current weights.

    Returns:
        All samples that were generated; and the groups to train on, in the order of generation, as many as in `first`
        or fewer, even none. Both have the seconds of all generation. The metrics of the latter count `reward/refills`
        batches, `reward/dropped_groups` of equal rewards and `reward/surplus_groups` with differing rewards that were
        not needed.
    """
    wanted = len(first.rollouts.prompts)
    parts, found = [first], len(groups_with_signal(first))
    while any(all_gather_object(found < wanted)) and len(parts) <= max_refills:  # every rank generates equally often
        parts.append(generate())
        found += len(groups_with_signal(parts[-1]))
    generated = merge(parts)
    kept = select(generated, groups_with_signal(generated)[:wanted])
    kept.metrics = {
        "reward/refills": float(len(parts) - 1),
        "reward/dropped_groups": float(len(generated.rollouts.prompts) - found),
        "reward/surplus_groups": float(max(0, found - wanted)),
    }
    return generated, kept


def groups_with_signal(experience: Experience) -> list[int]:
    """The groups whose rewards are not all equal, in order."""
    rewards = experience.scores.total.view(-1, experience.rollouts.group_size)
    return torch.nonzero((rewards != rewards[:, :1]).any(dim=1)).flatten().tolist()


def merge(parts: Sequence[Experience]) -> Experience:
    """Concatenates scored batches of one policy. What `Algorithm.prepare` reads and writes is left out.

    Args:
        parts: Batches of one group size and sampling, scored by the same rewards.
    """
    if len(parts) == 1:
        return parts[0]
    rollouts = _merge_rollouts([part.rollouts for part in parts])
    names = parts[0].scores.parts
    return Experience(
        rollouts=rollouts,
        texts=[text for part in parts for text in part.texts],
        splits=[split for part in parts for split in part.splits],
        thought_tokens=torch.cat([part.thought_tokens for part in parts]),
        scores=Scores(
            total=torch.cat([part.scores.total for part in parts]),
            parts={name: torch.cat([part.scores.parts[name] for part in parts]) for name in names},
            texts=[text for part in parts for text in part.scores.texts],
        ),
        group=_group_numbers(rollouts, parts[0].group.device),
        lengths=torch.cat([part.lengths for part in parts]),
        engine_logprobs=torch.cat([part.engine_logprobs for part in parts]),
    )


def select(experience: Experience, groups: Sequence[int]) -> Experience:
    """Selects groups of a scored batch, in the given order. What `Algorithm.prepare` reads and writes is left out.

    Args:
        experience: A scored batch.
        groups: Numbers of the groups to keep; may be empty.
    """
    size, device = experience.rollouts.group_size, experience.lengths.device
    samples = [group * size + k for group in groups for k in range(size)]
    rows = torch.tensor(samples, dtype=torch.long, device=device)
    starts = experience.lengths.cumsum(0) - experience.lengths
    lengths = experience.lengths[rows]
    ends = lengths.cumsum(0)
    shift = (starts[rows] - (ends - lengths)).repeat_interleave(
        lengths
    )  # from the old position of a token to the new one
    tokens = torch.arange(len(shift), device=device) + shift
    rollouts = _select_rollouts(experience.rollouts, groups, samples, tokens)
    scores = experience.scores
    return Experience(
        rollouts=rollouts,
        texts=[experience.texts[i] for i in samples],
        splits=[experience.splits[i] for i in samples],
        thought_tokens=experience.thought_tokens[rows],
        scores=Scores(
            total=scores.total[rows],
            parts={name: values[rows.to(values.device)] for name, values in scores.parts.items()},
            texts=[scores.texts[i] for i in samples],
        ),
        group=_group_numbers(rollouts, device),
        lengths=lengths,
        engine_logprobs=experience.engine_logprobs[tokens],
    )


def _merge_rollouts(parts: Sequence[RolloutBatch]) -> RolloutBatch:
    first = parts[0]
    references = [part.ref_logprobs for part in parts if part.ref_logprobs is not None]
    return RolloutBatch(
        prompts=[prompt for part in parts for prompt in part.prompts],
        group_size=first.group_size,
        prompt_ids=[ids for part in parts for ids in part.prompt_ids],
        completion_ids=[ids for part in parts for ids in part.completion_ids],
        engine_logprobs=torch.cat([part.engine_logprobs for part in parts]),
        finish=[reason for part in parts for reason in part.finish],
        sampling=first.sampling,
        weight_version=first.weight_version,
        lag=first.lag,
        epoch=first.epoch,
        off_policy=any(part.off_policy for part in parts),
        rounded=first.rounded,
        ref_logprobs=torch.cat(references) if len(references) == len(parts) else None,
        epochs=[epoch for part in parts for epoch in part.epochs or [part.epoch] * len(part.prompts)],
        seconds={phase: sum(part.seconds[phase] for part in parts) for phase in first.seconds},
    )


def _select_rollouts(
    rollouts: RolloutBatch, groups: Sequence[int], samples: Sequence[int], tokens: Tensor
) -> RolloutBatch:
    def here(values: Tensor) -> Tensor:
        return values[tokens.to(values.device)]

    return RolloutBatch(
        prompts=[rollouts.prompts[g] for g in groups],
        group_size=rollouts.group_size,
        prompt_ids=[rollouts.prompt_ids[g] for g in groups],
        completion_ids=[rollouts.completion_ids[i] for i in samples],
        engine_logprobs=here(rollouts.engine_logprobs),
        finish=[rollouts.finish[i] for i in samples],
        sampling=rollouts.sampling,
        weight_version=rollouts.weight_version,
        lag=rollouts.lag,
        epoch=rollouts.epoch,
        off_policy=rollouts.off_policy,
        rounded=rollouts.rounded,
        ref_logprobs=None if rollouts.ref_logprobs is None else here(rollouts.ref_logprobs),
        epochs=None if rollouts.epochs is None else [rollouts.epochs[g] for g in groups],
        seconds=rollouts.seconds,
    )


def _group_numbers(rollouts: RolloutBatch, device: torch.device) -> Tensor:
    return torch.arange(len(rollouts.prompts), device=device).repeat_interleave(rollouts.group_size)
