"""Supervised data modules: rows are filtered, split and ordered by the seed and their numbers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlmt.data import PreferenceDataModule, SFTDataModule
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.rewards.conversation import ConversationReader


class Module:
    """The part of SFT or RewardModeling that the data modules use."""

    max_positions = 100

    def __init__(self, tokenizer: Any, data_module: str = "SFTDataModule") -> None:
        self.data_module = data_module
        self.format, self.tokenizer = ThinkingFormat("no_think"), tokenizer
        self.reader = ConversationReader(tokenizer, "rm")


def set_up(data: Any, module: Module, stage: str = "fit", rank: int = 0, ranks: int = 1) -> Any:
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=rank, world_size=ranks)
    data.setup(stage)
    return data


@pytest.fixture
def source(tmp_path: Path) -> str:
    """20 rows whose responses have 1 to 20 letters."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "Hi", "response": "x" * n}) + "\n" for n in range(1, 21)))
    return str(path)


def order(data: SFTDataModule, batches: int) -> list[list[int]]:
    found: list[list[int]] = []
    while len(found) < batches:
        found += [[row.index for row in batch.rows] for batch in data.train_dataloader()]
    return found[:batches]


def test_long_rows_are_dropped_and_their_number_is_logged(source, byte_tokenizer, caplog):
    """7 tokens of template and prompt, the response, and the end of the turn: 15 letters make 23."""
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        data = set_up(SFTDataModule(source, batch_size=2, max_length=23, val_size=3), Module(byte_tokenizer))
    assert f"dropped 5 of 20 demonstrations over 23 tokens ({source})" in caplog.text
    assert "12 demonstrations to train on, 3 to validate on" in caplog.text
    assert max(row.longest for row in data.train_rows + data.val_rows) == 23


def test_long_preferences_are_dropped_and_their_number_is_logged(tmp_path, byte_tokenizer, caplog):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "Hi", "chosen": "yes", "rejected": "n" * n} for n in (1, 20, 30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        module = Module(byte_tokenizer, "PreferenceDataModule")
        data = set_up(PreferenceDataModule(str(path), batch_size=1, max_length=29, val_size=0), module)
    assert "dropped 1 of 3 comparisons over 29 tokens" in caplog.text
    assert sorted(row.longest for row in data.train_rows) == [12, 29]


@pytest.mark.parametrize("kind", [SFTDataModule, PreferenceDataModule])
def test_splits_of_a_folder_are_trained_and_validated_on(kind, tmp_path, byte_tokenizer):
    columns = {"response": "a"} if kind is SFTDataModule else {"chosen": "a", "rejected": "b"}
    (tmp_path / "data").mkdir()
    for split, count in (("train_prefs", 6), ("test_prefs", 3), ("test_other", 1)):
        rows = "".join(json.dumps({"prompt": f"{split} {n}"} | columns) + "\n" for n in range(count))
        (tmp_path / "data" / f"{split}-00000-of-00001.jsonl").write_text(rows)
    module = Module(byte_tokenizer, kind.__name__)
    options = {"batch_size": 2, "max_length": 100, "split": "train_prefs", "val_split": "test_prefs"}
    data = set_up(kind(str(tmp_path), **options), module)
    assert (len(data.train_rows), len(data.val_rows)) == (6, 3)
    data = set_up(kind(str(tmp_path), val_path=str(tmp_path), **(options | {"val_split": "test_other"})), module)
    assert (len(data.train_rows), len(data.val_rows)) == (6, 1)
    with pytest.raises(UserError, match="--data.val_size is 4, but .* has 3"):
        set_up(kind(str(tmp_path), val_size=4, **options), module)


def test_split_and_order_depend_only_on_the_seed_and_the_rows(source, byte_tokenizer):
    first, again, other, fewer = (
        set_up(SFTDataModule(source, 4, max_length, val_size=4, seed=seed), Module(byte_tokenizer))
        for max_length, seed in ((100, 0), (100, 0), (100, 1), (27, 0))
    )
    held_out = {row.index for row in first.val_rows}
    assert len(held_out) == 4 and held_out.isdisjoint(row.index for row in first.train_rows)
    batches = order(first, 8)
    assert order(again, 8) == batches != order(other, 8)
    for epoch in (batches[:4], batches[4:]):
        assert sorted(sum(epoch, [])) == sorted(row.index for row in first.train_rows)
    assert batches[:4] != batches[4:]
    kept = [i for i in sum(batches[:4], []) if i in {row.index for row in fewer.train_rows}]
    seen = [i for i in sum(order(fewer, 3), []) if i in kept]
    assert seen == kept[: len(seen)]


def test_batches_are_sharded_over_ranks(source, byte_tokenizer):
    """Training batches and 7 validation rows; the last validation batch has a row for only one of two ranks."""
    alone, *ranks = (
        set_up(SFTDataModule(source, 2, 100, val_size=7), Module(byte_tokenizer), "fit", rank, size)
        for rank, size in ((0, 1), (0, 2), (1, 2))
    )
    shares = [order(data, 8) for data in ranks]
    assert [[*mine, *other] for mine, other in zip(*shares, strict=True)] == order(alone, 8)
    assert all(len(share) == 1 for share in sum(shares, []))
    whole, *shares = ([[row.index for row in b.rows] for b in data.val_dataloader()] for data in (alone, *ranks))
    assert [[*mine, *other] for mine, other in zip(*shares, strict=True)] == whole
    assert [len(batch) for batch in whole] == [2, 2, 2, 1] and shares[1][-1] == []
    assert ranks[1].val_dataloader().sampler.num_samples == 4
    stopped, whole = (set_up(SFTDataModule(source, 2, 100, val_size=7), Module(byte_tokenizer)) for _ in range(2))
    loader = iter(stopped.train_dataloader())
    for _ in range(4):
        next(loader)
    resumed = set_up(SFTDataModule(source, 2, 100, val_size=7), Module(byte_tokenizer), rank=1, ranks=2)
    resumed.load_state_dict(stopped.state_dict())
    assert order(resumed, 2) == [batch[1:] for batch in order(whole, 6)[4:]]


def test_batch_size_must_be_divisible_by_the_ranks(source, byte_tokenizer):
    with pytest.raises(UserError, match="--data.batch_size is 3, which is not divisible by 2 devices; use a multiple"):
        set_up(SFTDataModule(source, 3, 100, val_size=2), Module(byte_tokenizer), ranks=2)


def test_training_resumes_within_an_epoch(source, byte_tokenizer):
    whole = set_up(SFTDataModule(source, 3, 100, val_size=2), Module(byte_tokenizer))
    expected = order(whole, 12)
    stopped = set_up(SFTDataModule(source, 3, 100, val_size=2), Module(byte_tokenizer))
    loader = iter(stopped.train_dataloader())
    for _ in range(4):
        next(loader)
    resumed = set_up(SFTDataModule(source, 3, 100, val_size=2), Module(byte_tokenizer))
    resumed.load_state_dict({"drawn": 12, "fingerprint": stopped.state_dict()["fingerprint"]})
    assert order(resumed, 8) == expected[4:]
    changed = set_up(SFTDataModule(source, 3, 100, system="Be kind.", val_size=2), Module(byte_tokenizer))
    with pytest.raises(UserError, match="made with other training data"):
        changed.load_state_dict(stopped.state_dict())


def test_val_path_provides_the_validation_rows(source, tmp_path, byte_tokenizer):
    held_out = tmp_path / "val.jsonl"
    held_out.write_text('{"prompt": "Ho", "response": "a"}\n{"prompt": "Hu", "response": "b"}\n')
    data = set_up(SFTDataModule(source, 5, 100, val_path=str(held_out)), Module(byte_tokenizer))
    assert (len(data.train_rows), [row.index for row in data.val_rows]) == (20, [0, 1])
    assert [[row.index for row in batch.rows] for batch in data.val_dataloader()] == [[0, 1]]
    assert set_up(SFTDataModule(source, 5, 100, val_size=0), Module(byte_tokenizer)).val_dataloader() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"^SFTDataModule\.batch_size is 0: must be an integer"),
        ({"max_length": -1}, r"^SFTDataModule\.max_length is -1: must be an integer"),
        ({"val_size": -1}, r"^SFTDataModule\.val_size is -1: must be an integer"),
        ({"val_size": 21}, "--data.val_size is 21, but .* has 20 demonstrations"),
        ({"val_size": 10, "batch_size": 11}, "has only 10 demonstrations for training"),
        ({"max_length": 101}, "exceeds the model's context of 100 tokens"),
        ({"max_length": 8, "val_size": 0}, "all 20 demonstrations exceed --data.max_length 8"),
        ({"system": " "}, "--data.system is empty"),
    ],
)
def test_options_out_of_range(options, message, source, byte_tokenizer):
    with pytest.raises(UserError, match=message):
        set_up(SFTDataModule(source, **({"max_length": 100, "batch_size": 2} | options)), Module(byte_tokenizer))


def test_module_for_other_data_is_refused(source, byte_tokenizer):
    with pytest.raises(UserError, match="--data is SFTDataModule, but --model Module trains on PreferenceDataModule"):
        set_up(SFTDataModule(source), Module(byte_tokenizer, "PreferenceDataModule"))
