"""Rows padded or packed: the same tokens and states, in as few passes as their budget allows."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from rlmt.models.rows import group_rows, pack_by_length, packs_rows, row_states, stack_rows
from rlmt.models.varlen import VARLEN, register_varlen

CPU = torch.device("cpu")
ROWS = [torch.tensor(row, dtype=torch.int32) for row in ([5, 6, 7], [8], [9, 10, 11, 12])]


def test_rows_are_padded_or_follow_each_other() -> None:
    ids, packing = stack_rows(ROWS, packed=False, device=CPU)
    assert ids.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [9, 10, 11, 12]] and packing is None
    ids, packing = stack_rows(ROWS, packed=True, device=CPU)
    assert packing is not None and ids.dtype == torch.long and packing.boundaries.dtype == torch.int32
    assert ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]] and packing.lengths == [3, 1, 4]
    assert packing.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]] and packing.boundaries.tolist() == [0, 3, 4, 8]


@pytest.mark.parametrize("packed", [False, True])
def test_states_are_those_of_each_row_alone(packed: bool) -> None:
    register_varlen()
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = LlamaModel(LlamaConfig(vocab_size=31, initializer_range=0.5, **shape)).eval()
    alone = [decoder(input_ids=row.long()[None]).last_hidden_state[0] for row in ROWS]
    if packed:
        decoder.set_attn_implementation(VARLEN)
    assert packs_rows(decoder) == packed
    rows, columns = torch.tensor([2, 0, 2, 1]), torch.tensor([3, 1, 0, 0])
    states = row_states(decoder, *stack_rows(ROWS, packed, CPU), rows, columns)
    torch.testing.assert_close(states, torch.stack([alone[2][3], alone[0][1], alone[2][0], alone[1][0]]))


def test_packed_rows_fill_groups_to_the_budget() -> None:
    assert pack_by_length([3, 9, 1, 4, 4, 2], 9) == [[1], [3, 4, 2], [0, 5]]
    assert pack_by_length([30, 2], 9) == [[0], [1]]
    assert pack_by_length([], 9) == []
    assert group_rows([[3, 1], [9], [2, 2]], 9, True, CPU) == [[1], [0, 2]]
    assert group_rows([[3, 1], [9], [2, 2]], 9, False, CPU) == [[1], [0], [2]]  # 2 × 3 and 2 × 2 tokens with padding


@pytest.mark.parametrize("seed", range(5))
def test_packed_groups_hold_every_row_once_and_at_most_one_is_half_empty(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 300) for _ in range(64)]
    groups = pack_by_length(lengths, 1000)
    assert sorted(i for group in groups for i in group) == list(range(64))
    sums = [sum(lengths[i] for i in group) for group in groups]
    assert sums == sorted(sums, reverse=True) and sums[0] <= 1000
    assert all(total > 700 for total in sums[:-1])  # a row of at most 300 would have fitted
