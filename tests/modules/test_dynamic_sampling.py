"""Merging, selecting and resampling of groups, sample by sample."""

from dataclasses import fields
from typing import Any

import pytest
import torch

from rlmt.modules.dynamic_sampling import groups_with_signal, merge, resample, select
from rlmt.types import Experience, FinishReason, Prompt, RolloutBatch, Sampling, Scores, Split, Status

SIZE = 2


def batch(first: int, rewards: list[list[float]], epoch: int = 0) -> Experience:
    """Prompts `first`, `first` + 1, …, each with two samples; every value identifies its sample."""
    prompts = [Prompt(first + k, [{"role": "user", "content": str(first + k)}]) for k in range(len(rewards))]
    names = [10 * p.index + s for p in prompts for s in range(SIZE)]
    lengths = [1 + name % 7 for name in names]
    flat = torch.tensor([name + t / 10 for name, n in zip(names, lengths, strict=True) for t in range(n)])
    rollouts = RolloutBatch(
        prompts=prompts,
        group_size=SIZE,
        prompt_ids=[[p.index] for p in prompts],
        completion_ids=[[name] * n for name, n in zip(names, lengths, strict=True)],
        engine_logprobs=-flat,
        finish=[FinishReason.LENGTH if name % 3 else FinishReason.STOP for name in names],
        sampling=Sampling(0.7, 30),
        weight_version=5,
        epoch=epoch,
        ref_logprobs=-2 * flat,
        seconds={"rollout": 1.5, "sync": 0.0},
    )
    return Experience(
        rollouts=rollouts,
        texts=[f"text {name}" for name in names],
        splits=[Split("", f"response {name}", Status.OK) for name in names],
        thought_tokens=torch.tensor(names),
        scores=Scores(
            total=torch.tensor([r for group in rewards for r in group]),
            parts={"rm": torch.tensor([float(name) for name in names])},
            texts=[f"scored {name}" for name in names],
        ),
        group=torch.arange(len(prompts)).repeat_interleave(SIZE),
        lengths=torch.tensor(lengths),
        engine_logprobs=-flat,
    )


def rows(data: Experience) -> list[tuple[Any, ...]]:
    """Each sample with all that belongs to it."""
    r, epochs = data.rollouts, data.rollouts.epochs or [data.rollouts.epoch] * len(data.rollouts.prompts)
    assert r.ref_logprobs is not None and data.lengths.tolist() == r.lengths
    assert torch.equal(data.engine_logprobs, r.engine_logprobs)
    ours, reference = r.engine_logprobs.split(r.lengths), r.ref_logprobs.split(r.lengths)
    return [
        (
            *(r.prompts[i // SIZE].index, epochs[i // SIZE], r.prompt_ids[i // SIZE], r.completion_ids[i], r.finish[i]),
            *(ours[i].tolist(), reference[i].tolist(), data.texts[i], data.splits[i], int(data.thought_tokens[i])),
            *(float(data.scores.total[i]), float(data.scores.parts["rm"][i]), data.scores.texts[i]),
        )
        for i in range(len(r))
    ]


def test_merge_and_select_keep_samples_whole() -> None:
    one, two = batch(0, [[1, 2], [3, 3], [4, 5]]), batch(7, [[6, 6], [7, 8]], epoch=1)
    one.rollouts.lag, two.rollouts.lag = 1, 0
    one.rollouts.rounded = two.rollouts.rounded = True
    both = merge([one, two])
    assert rows(both) == rows(one) + rows(two) and both.rollouts.rounded and select(both, [0]).rollouts.rounded
    assert both.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert both.rollouts.epochs == [0, 0, 0, 1, 1] and both.rollouts.weight_version == 5
    assert both.rollouts.seconds == {"rollout": 3.0, "sync": 0.0} and both.rollouts.lag == 1
    assert groups_with_signal(both) == [0, 2, 4]
    some = select(both, [0, 2, 4])
    assert some.rollouts.lag == 1
    assert rows(some) == [rows(both)[i] for i in (0, 1, 4, 5, 8, 9)]
    assert some.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert rows(select(one, [1])) == rows(one)[2:4]
    none = select(both, [])
    assert len(none.rollouts) == 0 and rows(none) == []


def test_every_field_of_the_records_is_merged() -> None:
    """A new field has to be thought of in merge and select; this list is what they know."""
    made = {"old_logprobs", "values", "advantages", "returns", "pairs", "mask", "metrics", "ref_logprobs"}
    known = {"rollouts", "texts", "splits", "thought_tokens", "scores", "group", "lengths", "engine_logprobs"}
    assert {field.name for field in fields(Experience)} == known | made
    assert {field.name for field in fields(RolloutBatch)} == {
        *("prompts", "group_size", "prompt_ids", "completion_ids", "engine_logprobs", "finish", "sampling"),
        *("weight_version", "lag", "epoch", "off_policy", "rounded", "ref_logprobs", "epochs", "seconds"),
    }
    assert {field.name for field in fields(Scores)} == {"total", "parts", "texts"}


def test_resample_generates_until_the_batch_is_full() -> None:
    more = [batch(10, [[1, 1], [0, 1], [2, 2]]), batch(20, [[0, 1], [1, 0], [0, 0]]), batch(30, [[0, 1]] * 3)]
    calls = iter(more)
    first = batch(0, [[5, 5], [1, 2], [3, 3]])
    generated, kept = resample(first, 9, lambda: next(calls))
    assert [p.index for p in generated.rollouts.prompts] == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert [p.index for p in kept.rollouts.prompts] == [1, 11, 20]  # 21 is not needed
    assert kept.metrics == {"reward/refills": 2.0, "reward/dropped_groups": 5.0, "reward/surplus_groups": 1.0}
    assert next(calls) is more[2]


def test_resample_stops_at_max_refills() -> None:
    generated, kept = resample(batch(0, [[5, 5], [1, 2]]), 2, lambda: batch(10, [[0, 0], [0, 0]]))
    assert len(generated.rollouts.prompts) == 6 and [p.index for p in kept.rollouts.prompts] == [1]
    assert kept.metrics == {"reward/refills": 2.0, "reward/dropped_groups": 5.0, "reward/surplus_groups": 0.0}


@pytest.mark.parametrize("value", [0.1, -7.7, 1e6 + 0.1])
def test_nothing_with_spread(value: float) -> None:
    _, kept = resample(batch(0, [[value] * 2] * 2), 1, lambda: batch(10, [[value] * 2] * 2))
    assert len(kept.rollouts) == 0 and kept.metrics["reward/dropped_groups"] == 4


def test_resample_leaves_a_full_batch_alone() -> None:
    first = batch(0, [[1, 2], [2, 1]])
    generated, kept = resample(first, 4, lambda: pytest.fail("generated more"))
    assert generated is first and rows(kept) == rows(first) and set(kept.metrics.values()) == {0.0}
