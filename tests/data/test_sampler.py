"""Seeds of samples and the order of prompts, as pure functions."""

import itertools

import pytest

from rlmt.data import PromptDataset, PromptSampler, sample_seed, shuffled
from rlmt.errors import UserError
from rlmt.types import Prompt


def test_sample_seeds_equal_recorded_values():
    # blake2b("sample/0/0/0/0", 8 bytes), big-endian, shifted right by one, computed with hashlib by hand.
    assert sample_seed(0, 0, 0, 0) == 8_643_706_224_667_963_891
    assert sample_seed(7, 3, 1234, 5) == 7_975_850_294_270_900_313


def test_sample_seeds_are_distinct_and_in_range():
    seeds = [sample_seed(*key) for key in itertools.product((0, 1), range(3), range(200), range(8))]
    assert len(set(seeds)) == 2 * 3 * 200 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, 12, 3, 0) != sample_seed(1, 1, 23, 0)


def test_shuffled_order_is_stable_when_an_item_is_removed():
    keys = list(range(50))
    order = [keys[i] for i in shuffled(keys, 0, "split")]
    fewer = [k for k in keys if k != 17]
    assert sorted(order) == keys and order != keys
    assert [fewer[i] for i in shuffled(fewer, 0, "split")] == [k for k in order if k != 17]
    assert [keys[i] for i in shuffled(keys, 1, "split")] != order != [keys[i] for i in shuffled(keys, 0, "epoch 0")]


def dataset(count):
    return PromptDataset([Prompt(i, [{"role": "user", "content": str(i)}]) for i in range(count)])


@pytest.mark.parametrize("ranks", [2, 3])
def test_global_batches_do_not_depend_on_the_number_of_ranks(ranks):
    alone = list(PromptSampler(dataset(20), 6, 1, 0, seed=0))
    parts = [list(PromptSampler(dataset(20), 6, ranks, rank, seed=0)) for rank in range(ranks)]
    share = 6 // ranks
    assert len(alone) == 18 and all(len(part) == 18 // ranks for part in parts)
    for step in range(3):
        together = [i for part in parts for i in part[step * share : (step + 1) * share]]
        assert sorted(together) == sorted(alone[step * 6 : (step + 1) * 6])


def test_epochs_are_contiguous_over_interrupted_iterations():
    whole = PromptSampler(dataset(20), 6, 1, 0, seed=0)
    stream = [(i, whole.epoch) for _ in range(3) for i in whole]
    assert [epoch for _, epoch in stream] == [0] * 18 + [1] * 18 + [2] * 18
    assert all(len({i for i, e in stream if e == epoch}) == 18 for epoch in range(3))
    pieces = PromptSampler(dataset(20), 6, 1, 0, seed=0)
    pieces.set_epoch(7)  # Lightning's epoch number is ignored
    assert [(i, pieces.epoch) for _ in range(9) for i in itertools.islice(pieces, 6)] == stream


def test_iteration_continues_after_taken_positions():
    whole = PromptSampler(dataset(20), 6, 1, 0, seed=0)
    stream = [(i, whole.epoch) for _ in range(2) for i in whole]
    sampler = PromptSampler(dataset(20), 6, 1, 0, seed=0)
    got = []
    for i in sampler:
        got.append((i, sampler.epoch))
        if len(got) in (6, 24):
            got += [(i, sampler.epoch) for i in sampler.take(6)]
    assert got == stream[:30]  # an iteration yields the length of an epoch, regardless of `take`


def test_state_resumes_on_another_number_of_ranks():
    one = PromptSampler(dataset(20), 6, 1, 0, seed=0)
    order = [i for _ in range(2) for i in one]
    one = PromptSampler(dataset(20), 6, 1, 0, seed=0)
    assert list(itertools.islice(one, 6)) == order[:6]
    rest = []
    for rank in range(2):
        sampler = PromptSampler(dataset(20), 6, 2, rank, seed=0)
        sampler.load_state_dict(one.state_dict())
        rest.append(list(sampler))
    assert sorted(rest[0][:6] + rest[1][:6]) == sorted(order[6:18])
    assert sorted(rest[0][6:] + rest[1][6:]) == sorted(order[18:24])


def test_state_of_another_run_is_refused():
    state = PromptSampler(dataset(20), 6, 1, 0, seed=0).state_dict()
    for count, batch_size, seed in ((21, 6, 0), (20, 4, 0), (20, 6, 1)):
        with pytest.raises(UserError, match="the checkpoint was made with other training data"):
            PromptSampler(dataset(count), batch_size, 1, 0, seed=seed).load_state_dict(state)
