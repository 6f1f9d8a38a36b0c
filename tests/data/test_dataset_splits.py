"""Data as people have it: saved datasets, shards, splits and subsets, and lists of messages as JSON text."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlmt.data.demonstrations import load_demonstrations
from rlmt.data.preferences import load_preferences
from rlmt.data.prompts import load_prompts
from rlmt.data.tables import DataSource
from rlmt.errors import UserError

Row = dict[str, Any]


def prompt_row(name: str) -> Row:
    return {"prompt": f"say {name}"}


def demonstration_row(name: str) -> Row:
    return {"prompt": f"say {name}", "thought": "easy", "response": name}


def preference_row(name: str) -> Row:
    return {"prompt": f"say {name}", "chosen": name, "rejected": "no"}


def prompts_of(source: DataSource) -> list[str]:
    return [prompt.messages[-1]["content"] for prompt in load_prompts(source)]


def demonstrations_of(source: DataSource) -> list[str]:
    return [row.turns[0].context[-1]["content"] for row in load_demonstrations(source, thinks=True)]


def preferences_of(source: DataSource) -> list[str]:
    return [row.context[-1]["content"] for row in load_preferences(source)]


KINDS: dict[str, tuple[Callable[[str], Row], Callable[[DataSource], list[str]]]] = {
    "prompts": (prompt_row, prompts_of),
    "demonstrations": (demonstration_row, demonstrations_of),
    "preferences": (preference_row, preferences_of),
}


def write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(layout: str, folder: Path, row: Callable[[str], Row]) -> None:
    """A dataset with the rows a and b in split train, and t in split test."""
    train, test = [row("a"), row("b")], [row("t")]
    if layout == "save_to_disk":
        splits = {"train": datasets.Dataset.from_list(train), "test": datasets.Dataset.from_list(test)}
        datasets.DatasetDict(splits).save_to_disk(str(folder))
        return
    suffix = layout.removeprefix("shards.")
    write_rows(folder / f"data/train-00000-of-00002.{suffix}", train[:1])
    write_rows(folder / f"data/train-00001-of-00002.{suffix}", train[1:])
    write_rows(folder / f"data/test-00000-of-00001.{suffix}", test)


@pytest.fixture(autouse=True)
def quiet_datasets() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def error_of(source: DataSource | str) -> str:
    with pytest.raises(UserError) as caught:
        load_prompts(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["save_to_disk", "shards.parquet", "shards.jsonl"])
def test_folder_is_read_whole_split_by_split(kind: str, layout: str, tmp_path: Path) -> None:
    row, texts = KINDS[kind]
    make(layout, tmp_path / "set", row)
    name = str(tmp_path / "set")
    assert texts(DataSource(name)) == ["say a", "say b"]
    assert texts(DataSource(name, split="test")) == ["say t"]
    message = error_of(DataSource(name, split="validation"))
    assert message == (
        f"--data.split validation: {name} has no such split, only 'test', 'train'; set --data.split to one of them."
    )


def test_saved_dataset_without_splits_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list([prompt_row("a"), prompt_row("b")]).save_to_disk(str(tmp_path / "set"))
    name = str(tmp_path / "set")
    assert prompts_of(DataSource(name)) == ["say a", "say b"]
    assert "without splits; leave it out" in error_of(DataSource(name, split="train"))
    assert "without subsets; leave it out" in error_of(DataSource(name, subset="en"))
    (tmp_path / "set" / "data-00000-of-00001.arrow").unlink()
    assert "not a complete dataset of save_to_disk" in error_of(name)


def test_files_without_split_names_are_all_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "set" / "one.jsonl", [prompt_row("a")])
    write_rows(tmp_path / "set" / "two.jsonl", [prompt_row("b")])
    assert prompts_of(DataSource(str(tmp_path / "set"))) == ["say a", "say b"]


def test_only_split_is_read_whatever_its_name(tmp_path: Path) -> None:
    write_rows(tmp_path / "set" / "test-00000-of-00001.parquet", [prompt_row("t")])
    assert prompts_of(DataSource(str(tmp_path / "set"))) == ["say t"]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_one_shard_of_several_is_refused(suffix: str, tmp_path: Path) -> None:
    shard = tmp_path / f"train-00001-of-00002.{suffix}"
    shard.write_text("")
    assert error_of(str(shard)) == (
        f"{shard} is one of 2 shards; pass their folder to read all of them, or rename the file to read it alone."
    )
    write_rows(tmp_path / "only" / "train-00000-of-00001.jsonl", [prompt_row("a")])
    assert prompts_of(DataSource(str(tmp_path / "only" / "train-00000-of-00001.jsonl"))) == ["say a"]


def test_invalid_folders_are_one_line_errors(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    assert "is a folder without data files; use .parquet, .jsonl, .json, .csv files" in error_of(str(folder))
    write_rows(folder / "train-00000-of-00001.jsonl", [prompt_row("a")])
    write_rows(folder / "more.jsonl", [prompt_row("b")])  # the library would leave it out silently
    assert "more.jsonl belongs to none of the splits 'train'" in error_of(str(folder))
    (folder / "more.jsonl").unlink()
    (folder / "dataset_infos.json").write_text("{}")
    write_rows(folder / ".cache" / "old.jsonl", [prompt_row("c")])
    assert prompts_of(DataSource(str(folder))) == ["say a"]
    write_rows(folder / "train-00000-of-00001.jsonl", [prompt_row("a"), {"prompt": 3}])
    assert "train-00000-of-00001.jsonl line 2: `prompt` is of type int" in error_of(str(folder))
    plain = tmp_path / "texts"
    plain.mkdir()
    (plain / "a.txt").write_text("hello")
    assert "unknown extension '.txt'" in error_of(str(plain))
    file = tmp_path / "rows.jsonl"
    write_rows(file, [prompt_row("a")])
    for option in ("split", "subset"):
        assert f"--data.{option} x: {file} is a file, which has none" in error_of(
            DataSource(str(file), **{option: "x"})
        )


@pytest.fixture
def two_subsets(tmp_path: Path) -> Path:
    """A dataset with the subsets en and de, defined in the metadata of its README.md."""
    folder = tmp_path / "subsets"
    for language in ("en", "de"):
        for split in ("train_prefs", "test_prefs"):
            write_rows(folder / language / f"{split}.jsonl", [prompt_row(f"{language} {split}")])
    configs = [
        {
            "config_name": language,
            "data_files": [
                {"split": split, "path": f"{language}/{split}.jsonl"} for split in ("train_prefs", "test_prefs")
            ],
        }
        for language in ("en", "de")
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\nA set.\n")
    return folder


@pytest.mark.parametrize("hub", [False, True])
def test_subset_and_split_are_chosen(
    hub: bool, two_subsets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(two_subsets)
    if hub:  # the library itself, with the Hub's repository in a folder
        name, load, names = "owner/set", datasets.load_dataset, datasets.get_dataset_config_names
        monkeypatch.setattr(
            datasets, "load_dataset", lambda _, subset: load(str(two_subsets), subset, cache_dir=str(tmp_path / "c"))
        )
        monkeypatch.setattr(datasets, "get_dataset_config_names", lambda _: names(str(two_subsets)))
    assert prompts_of(DataSource(name, "test_prefs", "de")) == ["say de test_prefs"]
    assert prompts_of(DataSource(name, "train_prefs", "en")) == ["say en train_prefs"]
    assert error_of(name) == f"{name} has several subsets; set --data.subset to one of 'de', 'en'."
    assert (
        error_of(DataSource(name, None, "fr")) == "--data.subset fr: unknown; set --data.subset to one of 'de', 'en'."
    )
    assert error_of(DataSource(name, None, "en")) == (
        f"{name} has no 'train' split, only 'test_prefs', 'train_prefs'; set --data.split to one of them."
    )


def test_cache_that_cannot_be_written_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/cache/datasets")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert error_of("owner/set") == (
        "owner/set: the hub's cache cannot be written (/cache/datasets: Permission denied); set HF_HOME to a folder "
        "that can."
    )


# Messages as JSON text ------------------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "What is 'x' [1]?"}]
ANSWERED = [*TURNS, {"role": "assistant", "content": "A letter."}]
OTHER = [*TURNS, {"role": "assistant", "content": "A number."}]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("column", ["prompt", "messages", "conversation"])
def test_json_text_of_messages_is_a_conversation(suffix: str, column: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    rows = [{column: json.dumps(TURNS, indent=indent)} for indent in (None, 2)] * 15
    if suffix == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [column])
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_rows(path, rows)
    read = load_prompts(str(path), column=column if column == "conversation" else None)
    assert [prompt.messages for prompt in read] == [TURNS] * 30


def test_json_text_in_demonstrations_and_preferences(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"messages": json.dumps(ANSWERED)}, {"prompt": json.dumps(TURNS), "response": "A letter."}])
    turns = [row.turns for row in load_demonstrations(str(path), thinks=False)]
    assert [(turn.context, turn.response) for (turn,) in turns] == [(TURNS, "A letter.")] * 2
    pair = {"chosen": json.dumps(ANSWERED), "rejected": json.dumps(OTHER)}
    texts = {"prompt": json.dumps(TURNS), "chosen": "A letter.", "rejected": "A number."}
    write_rows(path, [pair, texts])
    for row in load_preferences(str(path)):
        assert (row.context, row.responses) == (TURNS, ["A letter.", "A number."])


@pytest.mark.parametrize("text", ["[1] and [2]", "[{}]", '[{"role": "x"}]', "Fix this: " + json.dumps(TURNS), "[{a}]"])
def test_other_text_in_brackets_stays_text(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"prompt": text}])
    assert load_prompts(str(path))[0].messages == [{"role": "user", "content": text}]


@pytest.mark.parametrize("kind", KINDS)
def test_printed_python_list_of_messages_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{**KINDS[kind][0]("a"), "prompt": str(TURNS)}])
    with pytest.raises(UserError, match="line 1: `prompt` is a list of messages as text, but not JSON"):
        KINDS[kind][1](DataSource(str(path)))
