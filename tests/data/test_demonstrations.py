"""Demonstrations: which tokens are trained, compared with token lists written by hand."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlmt.data.demonstrations import (
    Demonstration,
    DemonstrationEncoder,
    SFTDataModule,
    Turn,
    load_demonstrations,
)
from rlmt.errors import UserError
from rlmt.formats.resolve import resolve_format
from rlmt.formats.thinking import ThinkingFormat
from rlmt.types import Split, Status

from ..chat_templates import SHAPES


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pieces(source: str, form: ThinkingFormat, tokenizer: Any, system: str | None = None) -> list[tuple[str, str]]:
    """Prompt and target of each sequence of the first row, decoded token by token."""
    (row, *_) = load_demonstrations(source, form.thinks, system)
    encoded = DemonstrationEncoder(form, tokenizer)(row)
    rows = [sequence.tolist() for sequence in encoded.sequences]
    return [
        (tokenizer.decode(ids[:prompt]), tokenizer.decode(ids[prompt:]))
        for ids, prompt in zip(rows, encoded.prompts, strict=True)
    ]


def error_of(source: str, thinks: bool = True) -> str:
    with pytest.raises(UserError) as caught:
        load_demonstrations(source, thinks)
    assert "\n" not in str(caught.value)
    return str(caught.value)


COLUMNS = {"prompt": "Hi", "thought": "greet\n", "response": " Hello!"}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        user("Hi"),
        assistant("<think>\ngreet\n</think>\n\nHello!"),
        user("Bye"),
        assistant("<think>part</think>So long."),
    ]
}


def test_token_ids_of_a_demonstration_by_hand(tmp_path, byte_tokenizer):
    source = write(tmp_path / "rows.jsonl", COLUMNS)
    (row,) = load_demonstrations(source, thinks=True)
    encoded = DemonstrationEncoder(ThinkingFormat("think"), byte_tokenizer)(row)
    target = "<think>ĊgreetĊ</think>ĊĊHello!"  # Ċ is how the alphabet writes a newline
    tokens = ["<s>", "<|user|>", "H", "i", "<|im_end|>", "Ċ", "<|assistant|>", *target, "<|im_end|>"]
    assert encoded.sequences[0].tolist() == byte_tokenizer.convert_tokens_to_ids(tokens)
    assert encoded.prompts == [7]
    assert encoded.longest == 7 + len(target) + 1


def test_no_think_drops_the_thought_of_the_same_data(tmp_path, byte_tokenizer):
    for rows in (COLUMNS, {"messages": [user("Hi"), assistant("<think>greet</think> Hello!")]}):
        source = write(tmp_path / "rows.jsonl", rows)
        prompt = "<s><|user|>Hi<|im_end|>\n<|assistant|>"
        think = pieces(source, ThinkingFormat("think"), byte_tokenizer)
        assert think == [(prompt, "<think>\ngreet\n</think>\n\nHello!<|im_end|>")]
        assert pieces(source, ThinkingFormat("no_think"), byte_tokenizer) == [(prompt, "Hello!<|im_end|>")]


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        *(
            (shape, name)
            for shape in ("ChatML", "Llama 3.2, with the date", "Qwen2.5", "Phi-3", "Gemma")
            for name in ("think", "no_think")
        ),
        ("Qwen3", "think"),
        ("Qwen3.5", "think"),
    ],
)
def test_sequence_is_the_conversation_that_the_template_writes(shape, name):
    """Up to the token that ends the turn; the template renders the target as the content of the assistant's turn."""
    tokenizer = SHAPES[shape].tokenizer()
    form = resolve_format(ThinkingFormat(name), tokenizer, shape)
    row = Demonstration(0, [Turn([user("Hi")], "a plan", "Hello!")])
    ids = DemonstrationEncoder(form, tokenizer)(row).sequences[0].tolist()
    content = "<think>\na plan\n</think>\n\nHello!" if name == "think" else "Hello!"
    text = tokenizer.apply_chat_template(
        [user("Hi"), assistant(content)], tokenize=False, date_string="26 Jul 2024", **form.chat_template_kwargs
    )
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == whole[: len(ids)]
    ends = {"Llama 3.2, with the date": "<|eot_id|>", "Phi-3": "<|end|>", "Gemma": "<end_of_turn>"}
    assert tokenizer.decode(ids[-1:]) == ends.get(shape, "<|im_end|>")


@pytest.mark.parametrize(
    ("shape", "end"), [("GLM-4.5", "<|user|>"), ("OpenChat", "<|end_of_turn|>"), ("R1 distill", "<|end_of_sentence|>")]
)
def test_target_ends_with_the_token_of_the_template(shape, end):
    tokenizer = SHAPES[shape].tokenizer()
    form = resolve_format(ThinkingFormat("think"), tokenizer, shape)
    encoded = DemonstrationEncoder(form, tokenizer)(Demonstration(0, [Turn([user("Hi")], "a plan", "Hello!")]))
    (ids,), (prompt,) = encoded.sequences, encoded.prompts
    opening = "" if shape == "R1 distill" else "<think>\n"
    assert tokenizer.decode(ids[prompt:]) == f"{opening}a plan\n</think>\n\nHello!{end}"


def test_prefill_moves_the_opening_tag_into_the_prompt(tmp_path, byte_tokenizer):
    ((prompt, target),) = pieces(
        write(tmp_path / "rows.jsonl", COLUMNS), ThinkingFormat("think", prefill=True), byte_tokenizer
    )
    assert prompt.endswith("<|assistant|><think>\n")
    assert target == "greet\n</think>\n\nHello!<|im_end|>"


def test_zero_formats_end_with_the_eos_token(tmp_path, byte_tokenizer):
    source = write(tmp_path / "rows.jsonl", COLUMNS)
    ((prompt, target),) = pieces(source, ThinkingFormat("zero_think"), byte_tokenizer)
    assert prompt.endswith("User: <query>Hi</query>\nAssistant:")
    assert target == "<think> greet </think> <response> Hello! </response></s>"
    ((_, target),) = pieces(source, ThinkingFormat("zero_no_think"), byte_tokenizer)
    assert target == "<response> Hello! </response></s>"


def test_past_turns_of_a_chat_have_no_thoughts(tmp_path, byte_tokenizer):
    source = write(tmp_path / "rows.jsonl", CHAT)
    first = "<s><|system|>Be kind.<|im_end|>\n<|user|>Hi<|im_end|>\n<|assistant|>"
    second = first + "Hello!<|im_end|>\n<|user|>Bye<|im_end|>\n<|assistant|>"
    assert pieces(source, ThinkingFormat("think"), byte_tokenizer) == [
        (first, "<think>\ngreet\n</think>\n\nHello!<|im_end|>"),
        (second, "<think>\npart\n</think>\n\nSo long.<|im_end|>"),
    ]
    assert pieces(source, ThinkingFormat("no_think"), byte_tokenizer) == [
        (first, "Hello!<|im_end|>"),
        (second, "So long.<|im_end|>"),
    ]


@pytest.mark.parametrize("name", ["think", "no_think"])
def test_both_formats_train_the_turns_with_thoughts(name, tmp_path, byte_tokenizer):
    chat = [user("A"), assistant("plain"), user("B"), assistant("<think>t</think>thoughtful")]
    ((prompt, target),) = pieces(
        write(tmp_path / "rows.jsonl", {"messages": chat}), ThinkingFormat(name), byte_tokenizer
    )
    assert prompt == "<s><|user|>A<|im_end|>\n<|assistant|>plain<|im_end|>\n<|user|>B<|im_end|>\n<|assistant|>"
    assert target.endswith("thoughtful<|im_end|>")


def test_chat_without_thoughts_trains_all_turns(tmp_path, byte_tokenizer):
    chat = [user("A"), assistant("one"), user("B"), assistant("two")]
    found = pieces(write(tmp_path / "rows.jsonl", {"messages": chat}), ThinkingFormat("no_think"), byte_tokenizer)
    assert [target for _, target in found] == ["one<|im_end|>", "two<|im_end|>"]


def test_prompt_has_several_turns_and_a_system_text(tmp_path, byte_tokenizer):
    row = {"prompt": [user("A"), assistant("<think>old</think>B"), user("C")], "thought": "t", "response": "D"}
    ((prompt, target),) = pieces(
        write(tmp_path / "rows.jsonl", row), ThinkingFormat("no_think"), byte_tokenizer, system="S"
    )
    assert (
        prompt
        == "<s><|system|>S<|im_end|>\n<|user|>A<|im_end|>\n<|assistant|>B<|im_end|>\n<|user|>C<|im_end|>\n<|assistant|>"
    )
    assert target == "D<|im_end|>"


def test_document_is_trained_except_its_first_token(tmp_path, byte_tokenizer):
    source = write(tmp_path / "rows.jsonl", {"text": "tea 4 cozy"}, COLUMNS | {"text": None})
    assert pieces(source, ThinkingFormat("think"), byte_tokenizer) == [("t", "ea 4 cozy</s>")]


def test_typed_control_strings_are_plain_characters(tmp_path, byte_tokenizer):
    row = {"prompt": "Hi", "thought": "<|im_end|>", "response": "a<|user|>b"}
    (parsed,) = load_demonstrations(write(tmp_path / "rows.jsonl", row), thinks=True)
    ids = DemonstrationEncoder(ThinkingFormat("think"), byte_tokenizer)(parsed).sequences[0].tolist()
    end, opens = byte_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|user|>"])
    assert ids.count(end) == 2 and ids[-1] == end  # of the user turn and of the assistant turn
    assert ids.count(opens) == 1


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\ue000\ue001"), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(thought=TEXT, response=TEXT, name=st.sampled_from(["think", "no_think", "zero_think", "zero_no_think"]))
def test_split_recovers_the_trained_target(thought, response, name, byte_tokenizer):
    form = ThinkingFormat(name)
    try:
        target = form.target(thought, response)
    except UserError:
        return
    encoder = DemonstrationEncoder(form, byte_tokenizer)
    split = form.split(form.decode(encoder._ids(target), byte_tokenizer))
    assert split == Split(thought.strip() if form.thinks else "", response.strip(), Status.OK)


def test_every_file_type_gives_the_same_rows(tmp_path):
    rows = [COLUMNS, {"prompt": "naïve, “x”", "thought": "a\nb", "response": "c"}]
    sources = [write(tmp_path / "a.jsonl", *rows), str(tmp_path / "a.json"), str(tmp_path / "a.parquet")]
    Path(sources[1]).write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), sources[2])
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "thought", "response"])
        writer.writeheader()
        writer.writerows(rows)
    sources.append(str(tmp_path / "a.csv"))
    first, *others = [load_demonstrations(source, thinks=True) for source in sources]
    assert len(first) == 2 and all(other == first for other in others)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (COLUMNS | {"thought": ""}, "`thought` is empty, but the format requires one"),
        (COLUMNS | {"thought": None}, "`thought` is missing, but the format requires one"),
        (COLUMNS | {"thought": 3}, "`thought` is of type int, not text"),
        (COLUMNS | {"response": " "}, "`response` is empty"),
        (COLUMNS | {"prompt": None}, "`prompt` is missing, not text"),
        (COLUMNS | {"prompt": [user("A"), assistant("B")]}, "`prompt` ends with an assistant turn"),
        (COLUMNS | {"response": "<think>a</think>b"}, "`response` contains a thought, and `thought` is filled, too"),
        (COLUMNS | CHAT, "both `messages` and `response` are filled"),
        ({"messages": [user("A")]}, "ends with a user turn"),
        ({"messages": [user("A"), assistant("B")]}, "the thought of turn 2 is missing, but the format requires one"),
        ({"messages": [user("A"), assistant("<think> </think>B")]}, "the thought of turn 2 is empty"),
        ({"messages": [user("A"), assistant("<think>a B")]}, "turn 2 contains a thought that cannot be separated"),
        ({"messages": [user("A"), assistant("<think>a</think>B</think>C")]}, "(stray_tag)"),
        ({"messages": [user("A"), assistant("<think>a</think> ")]}, "(empty_response)"),
        ({"messages": [user("A"), user("B")]}, "turn 2 has role 'user', expected 'assistant'"),
        ({"messages": "A"}, "`messages` is of type str, not a list of messages"),
        ({"text": " "}, "`text` is empty"),
        ({"prompt": "A"}, "`response` and `messages` missing"),
    ],
)
def test_error_names_the_file_and_line_of_an_invalid_row(row, expected, tmp_path):
    filled = COLUMNS | {"messages": None}
    message = error_of(write(tmp_path / "rows.jsonl", filled, row))
    assert message.startswith(f"{tmp_path}/rows.jsonl: line 2: ") and expected in message


def test_no_think_accepts_rows_without_thoughts(tmp_path):
    source = write(tmp_path / "rows.jsonl", {"prompt": "Hi", "response": "Hello"})
    assert "`thought` is missing" in error_of(source)
    assert load_demonstrations(source, thinks=False)[0].turns[0].response == "Hello"


def test_error_for_missing_columns_lists_the_available_ones(tmp_path):
    message = error_of(write(tmp_path / "rows.jsonl", {"prompt": "Hi", "answer": "Hello"}))
    assert "rows.jsonl has neither a column 'messages' nor both 'prompt' and 'response'" in message
    assert "'prompt', 'answer'" in message


def test_error_names_the_row_that_the_format_cannot_write(tmp_path, byte_tokenizer):
    class Module:
        format, tokenizer = ThinkingFormat("zero_no_think"), byte_tokenizer

    source = write(tmp_path / "rows.jsonl", COLUMNS, COLUMNS | {"response": "a</response>b"})
    with pytest.raises(UserError, match=r"rows.jsonl: row 2: .*cannot be written in format zero_no_think"):
        SFTDataModule(source).read(source, Module())
