"""Batches of rows of similar length."""

from rlmt.models.micro_batch import batches_by_length


def test_batches_cover_every_sample_once_within_the_budget() -> None:
    lengths = [5, 100, 7, 50, 51, 3, 99, 300]
    plan = batches_by_length(lengths, 200)
    assert sorted(i for batch in plan for i in batch) == list(range(8))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 200 for b in plan)
    assert plan == [[7], [1, 6], [4, 3, 2], [0, 5]]


def test_row_over_the_budget_is_a_batch_of_its_own() -> None:
    assert batches_by_length([3, 9, 1, 4, 4], 9) == [[1], [3, 4], [0, 2]]
    assert batches_by_length([30, 2], 9) == [[0], [1]]
    assert batches_by_length([], 9) == []
