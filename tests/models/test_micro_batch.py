"""Batches of rows of similar length."""

import itertools
import random

import pytest
import torch

from rlmt.models.rows import batches_by_length

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_batches_cover_every_sample_once_within_the_budget_and_the_largest_come_first() -> None:
    lengths = [5, 100, 7, 50, 51, 3, 99, 300]
    plan = batches_by_length(lengths, 200, CPU)
    assert sorted(i for batch in plan for i in batch) == list(range(8))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 200 for b in plan)
    assert plan == [[7], [1, 6], [4, 3], [2, 0, 5]]


def test_row_over_the_budget_is_a_batch_of_its_own() -> None:
    assert batches_by_length([3, 9, 1, 4, 4], 9, CPU) == [[1], [3, 4], [0, 2]]
    assert batches_by_length([30, 2], 9, CPU) == [[0], [1]]
    assert batches_by_length([], 9, CPU) == []
    assert batches_by_length([0, 0], 9, CPU) == [[0, 1]]


def test_short_row_joins_a_long_one_only_where_its_padding_costs_less_than_a_pass() -> None:
    assert batches_by_length([1000, 900], 9000, CPU) == [[0, 1]]
    assert batches_by_length([1000, 800], 9000, CPU) == [[0], [1]]  # a pass costs 128 tokens on a CPU
    assert batches_by_length([1000, 800], 9000, GPU) == [[0, 1]]
    assert batches_by_length([1000, 800], 9000, CPU, pass_tokens=100) == [[0, 1]]  # it repeats a shared prompt
    assert batches_by_length([500, 440], 9000, CPU) == [[0, 1]]
    assert batches_by_length([500, 440], 9000, CPU, rows=3) == [[0], [1]]


@pytest.mark.parametrize("seed", range(8))
def test_batches_cost_as_little_as_the_best_of_all_partitions(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 600) for _ in range(6)]
    budget, rows, prompt = draw.choice([700, 2000, 9000]), draw.choice([1, 2]), draw.choice([0, 90])

    def cost(groups: list[list[int]]) -> float:
        tokens = [len(group) * max(lengths[i] for i in group) * rows for group in groups]
        fits = all(len(group) == 1 or count <= budget for group, count in zip(groups, tokens, strict=True))
        return sum(count + 128 + prompt for count in tokens) if fits else float("inf")

    labels = itertools.product(range(6), repeat=6)
    partitions = [[[i for i in range(6) if of[i] == k] for k in sorted(set(of))] for of in labels if of[0] == 0]
    assert cost(batches_by_length(lengths, budget, CPU, rows, prompt)) == min(map(cost, partitions))
