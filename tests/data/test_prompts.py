import csv
import json
import os
from datetime import datetime
from hashlib import blake2b
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlmt.data.prompts import PromptDataset, _check_extra, load_prompts
from rlmt.errors import UserError

ROWS = ["Hi, there", "Line one\nline two", "Naïve “quotes” 😀", "a\u2028b\x00c"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write_jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write(path: Path, texts) -> str:
    rows = [{"id": i, "prompt": text} for i, text in enumerate(texts)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        write_jsonl(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "prompt"])
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def error_of(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load_prompts(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv", ".CSV"])
def test_all_file_types_give_equal_prompts(tmp_path, suffix):
    prompts = load_prompts(write(tmp_path / f"rows{suffix.lower()}", ROWS))
    assert [p.messages for p in prompts] == [[user(text)] for text in ROWS]
    assert [p.index for p in prompts] == [0, 1, 2, 3]


def test_suffix_case_and_byte_order_mark_are_ignored(tmp_path):
    path = tmp_path / "rows.JSONL"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "one"}\n\n{"prompt": "two"}')
    assert [p.messages[0]["content"] for p in load_prompts(str(path))] == ["one", "two"]


def test_system_prompt_is_added_and_extra_keys_are_dropped(tmp_path):
    own = [{"role": "system", "content": "Own."}, {**user("A"), "name": None}, assistant("B"), user("C")]
    source = write_jsonl(tmp_path / "rows.jsonl", [{"messages": own}, {"messages": [user("D")]}])
    first, second = load_prompts(source, system="Be kind.")
    assert first.messages == [{"role": "system", "content": "Own."}, user("A"), assistant("B"), user("C")]
    assert second.messages == [{"role": "system", "content": "Be kind."}, user("D")]
    assert load_prompts(source)[1].messages == [user("D")]


def test_named_columns_travel_with_the_prompt(tmp_path):
    rows = [
        {"prompt": "A", "reference": "42", "checklist": [{"item": "short", "weight": 2}], "unread": 1},
        {"prompt": "B", "reference": None, "checklist": [], "unread": 2},
    ]
    plain = write_jsonl(tmp_path / "rows.jsonl", rows)
    columnar = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), columnar)
    for source in (plain, str(columnar)):
        first, second = load_prompts(source, extra_columns=["reference", "checklist"])
        assert first.extra == {"reference": "42", "checklist": [{"item": "short", "weight": 2}]}
        assert second.extra == {"reference": None, "checklist": []}
        assert load_prompts(source)[0].extra == {}
    assert "--data.extra_columns" in error_of(plain, extra_columns=["rubric"])


def test_fingerprint_depends_on_the_extra_columns_only_where_there_are_some(tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "A", "reference": "42"}])
    plain = PromptDataset(load_prompts(source))
    assert plain.fingerprint() != PromptDataset(load_prompts(source, extra_columns=["reference"])).fingerprint()
    rows = json.dumps([0, [user("A")]]).encode()
    assert plain.fingerprint() == blake2b(rows, digest_size=16).hexdigest(), "as in checkpoints of earlier versions"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (float("nan"), "`extra` has the number nan, which JSON cannot represent"),
        (["ok", "lone \ud83d"], "`extra` contains a lone surrogate"),
        ({"at": datetime(2026, 1, 1)}, "`extra` has a value of type datetime"),
    ],
)
def test_columns_that_are_not_json_are_refused(value, problem):
    with pytest.raises(ValueError, match=problem):
        _check_extra("extra", value)


def test_parquet_messages_are_read_from_structs(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": [user("A"), assistant("B"), user("C")]}]), path)
    assert load_prompts(str(path))[0].messages == [user("A"), assistant("B"), user("C")]


def test_prompt_column_precedes_messages_unless_column_is_set(tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [user("M")], "prompt": "P", "question": "Q"}])
    assert load_prompts(source)[0].messages == [user("P")]
    assert load_prompts(source, column="messages")[0].messages == [user("M")]
    assert load_prompts(source, column="question")[0].messages == [user("Q")]


def test_long_csv_fields_are_read_and_the_global_limit_is_restored(tmp_path):
    limit = csv.field_size_limit()
    long = "x" * 200_000
    assert load_prompts(write(tmp_path / "rows.csv", [long]))[0].messages == [user(long)]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": ""}, "`prompt` is empty"),
        ({"prompt": " \n\t"}, "`prompt` is empty"),
        ({"prompt": None}, "`prompt` is missing"),
        ({"other": "x"}, "`prompt` is missing"),
        ({"prompt": 7}, "`prompt` is of type int, not text or a list of messages"),
        ({"prompt": {"role": "user"}}, "`prompt` is of type dict"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        ({"prompt": []}, "no user turn"),
        ({"prompt": [{"role": "system", "content": "S"}]}, "no user turn"),
        ({"prompt": ["Hi"]}, "turn 1 is not a message"),
        ({"prompt": [{"role": "user"}]}, "turn 1 is not a message"),
        ({"prompt": [user("A"), assistant(""), user("B")]}, "turn 2 is empty"),
        ({"prompt": [user(3)]}, "turn 1 is of type int, not text"),
        ({"prompt": [user("a\udfff")]}, "turn 1 contains a lone surrogate"),
        ({"prompt": [user("A"), user("B")]}, "turn 2 has role 'user', expected 'assistant'"),
        ({"prompt": [assistant("A"), user("B")]}, "turn 1 has role 'assistant', expected 'user'"),
        ({"prompt": [{"role": "tool", "content": "A"}]}, "turn 1 has role 'tool'"),
        (
            {"prompt": [user("A"), assistant("B"), {"role": "system", "content": "S"}]},
            "turn 3 has role 'system', expected 'user'",
        ),
        ({"prompt": [user("A"), assistant("B")]}, "ends with an assistant turn"),
    ],
)
def test_error_names_the_file_and_line_of_an_invalid_row(tmp_path, row, expected):
    source = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "good"}, row, {"prompt": "good"}])
    message = error_of(source)
    assert message.startswith(f"{source}: line 2: ")
    assert expected in message


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".csv"])
def test_rows_count_from_one_in_every_file_type(tmp_path, suffix):
    source = write(tmp_path / f"rows{suffix}", ["ok", "ok\nok", ""])
    assert error_of(source).startswith(f"{source}: row 3: `prompt` is empty")


def test_error_describes_only_the_first_invalid_rows(tmp_path):
    message = error_of(write(tmp_path / "rows.jsonl", ["", "good", "", "", "", ""]))
    assert "line 1" in message and "line 3" in message and "line 4" in message and "line 5" not in message
    assert "and 2 more invalid rows" in message


def test_text_in_a_messages_column_is_an_error(tmp_path):
    assert "not a list of messages" in error_of(write_jsonl(tmp_path / "rows.jsonl", [{"messages": "[]"}]))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv"])
def test_error_for_a_wrong_column_lists_the_available_ones(tmp_path, suffix):
    source = write(tmp_path / f"rows{suffix}", ROWS)
    message = error_of(source, column="question")
    assert source in message and "'question'" in message and "'id', 'prompt'" in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "contains no prompts"),
        ("a.csv", b"", "contains no prompts"),
        ("b.csv", b"prompt\n", "contains no prompts"),
        ("a.json", b"[]", "contains no prompts"),
        ("a.jsonl", b'{"prompt": "x"}\n{oops\n', "line 2 is not JSON"),
        ("a.jsonl", b'"text"\n', "line 1 is of type str, not an object"),
        ("a.json", b'{"prompt": "x"}\n{"prompt": "y"}\n', ".jsonl"),
        ("a.json", b'{"prompt": "x"}', "is not a list"),
        ("a.csv", b"prompt,id\nHello, you,1\n", "row 1 has more fields than the header"),
        ("a.csv", b'prompt\nok\n"open\n', "row 2 is not CSV"),
        ("a.csv", b"id,prompt\n1\n", "row 1: `prompt` is missing"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', "not UTF-8"),
        ("a.parquet", b"PAR1 not really", "not a readable parquet file"),
        ("a.txt", b"hello", "unknown extension '.txt'"),
        ("plain", b"hello", "unknown extension ''"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    message = error_of(str(path))
    assert message.startswith(str(path)) and expected in message


def test_missing_files_and_folders_are_refused(tmp_path):
    for missing in ("rows.parquet", "./rows", str(tmp_path / "nothing"), "~/nowhere-to-be-found", "a/b/c"):
        assert "does not exist" in error_of(missing)
    assert "is a folder without data files" in error_of(str(tmp_path))


def test_invalid_system_prompt_is_an_error(tmp_path):
    source = write(tmp_path / "rows.jsonl", ROWS)
    assert "--data.system is empty" in error_of(source, system=" ")
    assert "--data.system contains a lone surrogate" in error_of(source, system="\ud800")


def test_hub_datasets_are_read_by_name(monkeypatch):
    asked = []

    def load_dataset(name, subset):
        asked.append((name, subset))
        return datasets.DatasetDict(train=datasets.Dataset.from_list([{"prompt": "A"}, {"prompt": "B"}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [p.messages for p in load_prompts("owner/set-v1.5")] == [[user("A")], [user("B")]]
    assert asked == [("owner/set-v1.5", None)]
    assert "'prompt'" in error_of("owner/set-v1.5", column="text")


def test_hub_error_is_one_line(monkeypatch):
    def load_dataset(name, subset):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = error_of("owner/set")
    assert "owner/set" in message and "no route" in message


def test_fingerprint_depends_on_texts_and_order(tmp_path):
    first, second = load_prompts(write(tmp_path / "a.jsonl", ["A", "B"]))
    same = load_prompts(write(tmp_path / "b.csv", ["A", "B"]))
    other = load_prompts(write(tmp_path / "c.jsonl", ["A", "b"]))
    fingerprint = PromptDataset([first, second]).fingerprint()
    assert PromptDataset(same).fingerprint() == fingerprint
    assert PromptDataset(other).fingerprint() != fingerprint
    assert PromptDataset([second, first]).fingerprint() != fingerprint


@pytest.mark.skipif("RLMT_PROMPTS" not in os.environ, reason="RLMT_PROMPTS names no prompt file")
def test_real_prompt_set_loads():
    prompts = load_prompts(os.environ["RLMT_PROMPTS"])
    assert len(prompts) > 1000
    assert all(p.messages[-1]["role"] == "user" for p in prompts)
