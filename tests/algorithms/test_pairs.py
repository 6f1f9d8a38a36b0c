"""Pairs equal cases worked out by hand and an exhaustive search."""

import itertools
import random
from typing import Any

import pytest
import torch

from rlmt.algorithms.pairs import Pairs, best_and_worst, tie_key


def build(rewards: list[float], **options: Any) -> Pairs:
    """Pairs of one prompt's samples, all well formed and 10 tokens long, unless `options` override this."""
    size = len(rewards)
    defaults: dict[str, Any] = {
        "valid": [True] * size,
        "group": torch.zeros(size, dtype=torch.long),
        "tokens": torch.full((size,), 10),
        "ties": list(range(size)),
        "min_valid": 2,
        "min_margin": 0.0,
        "max_tokens": None,
    }
    return best_and_worst(torch.tensor(rewards), **(defaults | options))


def counts(found: Pairs) -> tuple[int, int, int]:
    return found.malformed, found.margin, found.length


def test_best_and_worst_of_interleaved_samples() -> None:
    found = build([1.0, 5.0, 3.0, -2.0, 2.0, 9.0], group=torch.tensor([0, 1, 0, 1, 0, 1]))
    assert found.pairs.tolist() == [[2, 0], [5, 3]]
    assert found.pairs.dtype == torch.int64
    assert counts(found) == (0, 0, 0)


def test_malformed_samples_are_in_no_pair() -> None:
    found = build([9.0, 1.0, 2.0, -9.0], valid=[False, True, True, False])
    assert found.pairs.tolist() == [[2, 1]]


@pytest.mark.parametrize(("well_formed", "pairs", "malformed"), [(3, 0, 1), (4, 1, 0)])
def test_prompts_below_min_valid_have_no_pair(well_formed: int, pairs: int, malformed: int) -> None:
    found = build([1.0, 2.0, 3.0, 4.0, 5.0], valid=[i < well_formed for i in range(5)], min_valid=4)
    assert found.pairs.shape == (pairs, 2)
    assert counts(found) == (malformed, 0, 0)


@pytest.mark.parametrize(
    ("rewards", "min_margin", "pairs"),
    [([1.0, 1.0, 1.0], 0.0, 0), ([1.0, 1.5, 1.25], 0.5, 1), ([1.0, 1.5, 1.25], 0.75, 0), ([1.0, 1.0 + 1e-6], 0.0, 1)],
)
def test_prompts_below_min_margin_or_with_equal_rewards_have_no_pair(
    rewards: list[float], min_margin: float, pairs: int
) -> None:
    found = build(rewards, min_margin=min_margin)
    assert len(found.pairs) == pairs
    assert counts(found) == (0, 1 - pairs, 0)


@pytest.mark.parametrize(("long", "pairs"), [(0, 0), (1, 1), (2, 0)])  # sample 0 is the worst, 2 the best, 1 in no pair
def test_pair_with_a_long_sample_is_dropped(long: int, pairs: int) -> None:
    tokens = torch.full((3,), 20)
    tokens[long] = 21
    found = build([1.0, 2.0, 3.0], tokens=tokens, max_tokens=20)
    assert len(found.pairs) == pairs
    assert counts(found) == (0, 0, 1 - pairs)


def test_skipped_prompt_counts_once_for_the_first_reason() -> None:
    rewards = [1.0, 2.0, 3.0, 3.0, 1.0, 2.0]
    found = build(
        rewards,
        group=torch.arange(3).repeat_interleave(2),
        valid=[True, False, True, True, True, True],
        tokens=torch.full((6,), 99),
        max_tokens=50,
    )
    assert found.pairs.shape == (0, 2)
    assert counts(found) == (1, 1, 1)


def test_prompts_without_a_well_formed_sample_are_counted() -> None:
    found = build([1.0, 2.0], valid=[False, False], group=torch.tensor([0, 3]))
    assert counts(found) == (4, 0, 0)


def test_pairs_equal_an_exhaustive_search() -> None:
    """Compares every pair of samples of every prompt: the largest margin wins, ties by the larger sum of keys."""
    make = random.Random(0)
    for _ in range(50):
        group = [make.randrange(4) for _ in range(20)] + [4]
        rewards = [float(make.randrange(5)) for _ in group]
        valid = [make.random() < 0.7 for _ in group]
        tokens = [make.randrange(5, 30) for _ in group]
        ties = [make.randrange(10**9) for _ in group]
        expected = []
        for prompt in range(5):
            own = [i for i in range(21) if group[i] == prompt and valid[i]]
            found = [(rewards[a] - rewards[b], ties[a] - ties[b], a, b) for a, b in itertools.permutations(own, 2)]
            if len(own) >= 3 and found:
                gap, _, a, b = max(found)
                if gap > 0 and gap >= 2 and max(tokens[a], tokens[b]) <= 25:
                    expected.append([a, b])
        got = build(
            rewards,
            group=torch.tensor(group),
            valid=valid,
            tokens=torch.tensor(tokens),
            ties=ties,
            min_valid=3,
            min_margin=2.0,
            max_tokens=25,
        )
        assert got.pairs.tolist() == expected
        assert len(expected) + sum(counts(got)) == 5


def test_ties_do_not_depend_on_sample_order_or_batch() -> None:
    completions = [[3, 1], [4, 1, 5], [9, 2], [6], [5, 3, 5], [8, 9]]
    rewards = [2.0, 2.0, 2.0, 1.0, 1.0, 1.0]

    def chosen(order: tuple[int, ...], seed: int, before: int = 0) -> tuple[list[int], list[int]]:
        """Pair of prompt 7, as completions, after a number of other samples."""
        ties = [0] * before + [tie_key(seed, 7, completions[i]) for i in order]
        values = [0.5] * before + [rewards[i] for i in order]
        group = torch.tensor([0] * before + [1] * len(order))
        (pair,) = build(values, ties=ties, group=group).pairs.tolist()
        best, worst = (completions[order[i - before]] for i in pair)
        return best, worst

    picks = set()
    for seed in range(30):
        (pick,) = {
            tuple(map(tuple, chosen(order, seed, before)))
            for order in [(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (2, 5, 0, 3, 1, 4)]
            for before in (0, 3)
        }
        picks.add(pick)
    # Nine pairs are equally good: other seeds choose others, and positions have no influence.
    assert len(picks) >= 7


def test_tie_keys_differ_between_prompts_seeds_and_samples() -> None:
    keys = {tie_key(seed, prompt, ids) for seed in (0, 1) for prompt in (0, 10) for ids in ([1], [1, 2], [2, 1])}
    assert len(keys) == 12
    assert tie_key(3, 1, [4, 5]) == 18302217117519516946  # the same on every machine
