"""Preference data: the compared pairs, and invalid rows."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlmt.data.preferences import PreferenceDataModule, load_preferences
from rlmt.errors import UserError
from rlmt.rewards.conversation import ConversationReader

PAIR = {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}
RANKED = {"prompt": "Hi", "responses": ["a", "b", "c", "b "], "scores": [1, 3, 1, 2]}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def error_of(source: str) -> str:
    with pytest.raises(UserError) as caught:
        load_preferences(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_texts_and_messages_give_equal_comparisons(tmp_path):
    chats = {"chosen": [user("Hi"), assistant("Hello!")], "rejected": [user("Hi"), assistant("No.")]}
    alone = {"prompt": [user("Hi")], "chosen": [assistant("Hello!")], "rejected": [assistant("No.")]}
    rows = [PAIR, chats, alone, {"prompt": "Hi"} | chats]
    expected = ([user("Hi")], ["Hello!", "No."], [(0, 1)], [0.0], None, {})
    for number, row in enumerate(rows):
        source = write(tmp_path / f"{number}.jsonl", row)
        (found,) = load_preferences(source)
        assert (
            found.context,
            found.responses,
            found.pairs,
            found.margins,
            found.subset,
            found.attributes,
        ) == expected
    pq.write_table(pa.Table.from_pylist([chats]), tmp_path / "rows.parquet")
    assert load_preferences(str(tmp_path / "rows.parquet"))[0].responses == ["Hello!", "No."]


def test_margins_subsets_and_ratings_are_read(tmp_path):
    rated = {"chosen_attributes": {"kind": 3, "brief": 1}, "rejected_attributes": {"brief": 2.5, "kind": 0}}
    (found,) = load_preferences(write(tmp_path / "rows.jsonl", PAIR | rated | {"margin": 0.5, "subset": "chat"}))
    assert (found.margins, found.subset) == ([0.5], "chat")
    assert found.attributes == {"brief": [1, 2.5], "kind": [3, 0]}
    listed = {"chosen_attributes": list(range(11)), "rejected_attributes": [0] * 11}
    (found,) = load_preferences(write(tmp_path / "rows.jsonl", PAIR | listed))
    assert [ratings[0] for ratings in found.attributes.values()] == list(range(11))
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected,margin\nHi,a,b,1.5\n")
    assert load_preferences(str(tmp_path / "rows.csv"))[0].margins == [1.5]


def test_scored_responses_give_all_pairs_with_different_scores_and_texts(tmp_path):
    (found,) = load_preferences(write(tmp_path / "rows.jsonl", RANKED | {"attributes": [[1], [2], [3], [4]]}))
    # b (3) beats a and c (1); "b " (2) beats a and c and equals b; a and c tie
    assert sorted(found.pairs) == [(1, 0), (1, 2), (3, 0), (3, 2)]
    assert found.responses == RANKED["responses"] and found.attributes == {"1": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR | {"chosen": ""}, "`chosen` is empty"),
        (PAIR | {"rejected": None}, "`rejected` is missing, not text"),
        (PAIR | {"prompt": None}, "`prompt` is missing, not text"),
        (PAIR | {"chosen": [user("Hi"), assistant("Hello!")]}, "is a list of messages and the other is not"),
        (PAIR | {"chosen": "<think>a</think>b"}, "`chosen` contains a thought, which a reward model must not see"),
        (PAIR | {"margin": "much"}, "`margin` is of type str, not a number"),
        (PAIR | {"margin": None}, "`margin` is missing, not a number"),
        (PAIR | {"margin": float("nan")}, "`margin` is nan"),
        (PAIR | {"margin": -1}, "`margin` is -1"),
        (
            PAIR | {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Ho"), assistant("b")]},
            "answer different conversations",
        ),
        (PAIR | {"chosen": [user("Hi")], "rejected": [user("Hi")]}, "`chosen` ends with a user turn"),
        (PAIR | {"chosen": [user("")], "rejected": [user("Hi")]}, "`chosen`: turn 1 is empty"),
        (PAIR | {"chosen_attributes": [1], "rejected_attributes": [1, 2]}, "rated by different attributes"),
        (PAIR | {"chosen_attributes": ["x"], "rejected_attributes": [1]}, "`chosen_attributes` 1 is of type str"),
        (PAIR | {"chosen_attributes": [], "rejected_attributes": []}, "`chosen_attributes` is empty"),
    ],
)
def test_error_names_the_file_and_line_of_an_invalid_pair(row, expected, tmp_path):
    message = error_of(write(tmp_path / "rows.jsonl", row))
    assert message.startswith(f"{tmp_path}/rows.jsonl: line 1: ") and expected in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"scores": [1, 2]}, "there are 4 responses and 2 scores"),
        ({"scores": 1}, "`scores` is of type int, not a list"),
        ({"scores": [1, 2, 3, None]}, "score 4 is missing"),
        ({"responses": ["a", "b", "c", " "]}, "response 4 is empty"),
        ({"attributes": [[1], [1]]}, "there are 4 responses and 2 attributes"),
    ],
)
def test_error_names_the_line_of_invalid_scores(change, expected, tmp_path):
    assert f"line 1: {expected}" in error_of(write(tmp_path / "rows.jsonl", RANKED | change))


def test_error_for_missing_columns_lists_the_available_ones(tmp_path):
    message = error_of(write(tmp_path / "rows.jsonl", {"prompt": "Hi", "chosen": "a"}))
    assert "has neither the columns 'chosen' and 'rejected' nor 'prompt', 'responses', 'scores'" in message
    assert "only 'prompt', 'chosen'" in message
    message = error_of(write(tmp_path / "rows.jsonl", PAIR | {"chosen_attributes": [1]}))
    assert "a column 'chosen_attributes' alone" in message


def test_rows_must_have_the_ratings_of_the_first_row(tmp_path):
    rows = [PAIR | {"chosen_attributes": [1] * n, "rejected_attributes": [2] * n} for n in (1, 2)]
    assert "line 2 has the ratings 1, 2, but line 1 has 1" in error_of(write(tmp_path / "rows.jsonl", *rows))


class Module:
    """The part of RewardModeling that the data module uses."""

    def __init__(self, tokenizer: Any) -> None:
        self.reader = ConversationReader(tokenizer, "rm")


def test_equal_responses_are_dropped_and_their_number_is_logged(tmp_path, byte_tokenizer, capsys, caplog):
    rows = [PAIR, PAIR | {"chosen": "No. "}, RANKED | PAIR, {**RANKED, "scores": [1, 1, 1, 1]}]
    source = write(tmp_path / "rows.jsonl", *rows)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        found = PreferenceDataModule(source).read(source, Module(byte_tokenizer))
    assert [row.index for row in found] == [0, 2]
    assert f"dropped 2 of 4 rows whose responses are equal ({source})" in caplog.text
    only = write(tmp_path / "only.jsonl", rows[1])
    with pytest.raises(UserError, match="the responses are equal in all 1 rows"):
        PreferenceDataModule(only).read(only, Module(byte_tokenizer))


def test_sequences_equal_the_reader_output(tmp_path, byte_tokenizer):
    source = write(tmp_path / "rows.jsonl", PAIR | {"rejected": "No.<|im_end|>"})
    (row,) = PreferenceDataModule(source).read(source, Module(byte_tokenizer))
    texts = [byte_tokenizer.decode(sequence) for sequence in row.sequences]
    template = "<s><|user|>Hi<|im_end|>\n<|assistant|>{}<|im_end|>\n"
    assert texts == [template.format("Hello!"), template.format("No. ")]  # a space for the control string
    assert row.longest == len("Hi") + len("Hello!") + 7
