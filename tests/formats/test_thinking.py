"""The thinking format on text: splitting, targets, and its file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlmt.errors import UserError
from rlmt.formats.thinking import FILE_NAME, FormatName, ThinkingFormat
from rlmt.types import Split, Status

TAGS = ("<think>", "</think>", "<response>", "</response>")
FORMATS = [
    ThinkingFormat(name, prefill)
    for name in get_args(FormatName)
    for prefill in (False, True)
    if not (name == "no_think" and prefill)
]
THINKING = [fmt for fmt in FORMATS if fmt.thinks]
THINK, NO_THINK = ThinkingFormat("think"), ThinkingFormat("no_think")
ZERO, ZERO_NO = ThinkingFormat("zero_think"), ThinkingFormat("zero_no_think")
PRE, ZERO_PRE, ZERO_NO_PRE = (ThinkingFormat(f.name, prefill=True) for f in (THINK, ZERO, ZERO_NO))

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name + ("-prefill" if f.prefill else ""))


OK, UNOPENED, UNCLOSED, STRAY, EMPTY = (
    Status.OK,
    Status.UNOPENED,
    Status.UNCLOSED,
    Status.STRAY_TAG,
    Status.EMPTY_RESPONSE,
)


@pytest.mark.parametrize(
    ("fmt", "text", "thought", "response", "status"),
    [
        # think
        (THINK, "<think>\nplan\n</think>\n\nHi!", "plan", "Hi!", OK),
        (THINK, " \n<think>plan</think>Hi! ", "plan", "Hi!", OK),
        (THINK, "<think></think>Hi", "", "Hi", OK),
        (THINK, "<think>a <think> b</think>Hi", "a <think> b", "Hi", OK),
        (THINK, "<think>z</think>Hi <thin", "z", "Hi <thin", OK),
        (THINK, "<think>z</think><response>Hi</response>", "z", "<response>Hi</response>", OK),
        (THINK, "plan</think>Hi", "plan", "", UNOPENED),
        (THINK, "Sure: <think>plan</think>Hi", "Sure: <think>plan", "", UNOPENED),
        (THINK, "</think>Hi", "", "", UNOPENED),
        (THINK, "<think>plan", "plan", "", UNCLOSED),
        (THINK, "<think>plan</think", "plan</think", "", UNCLOSED),
        (THINK, "<think>plan</ think>Hi", "plan</ think>Hi", "", UNCLOSED),
        (THINK, "Hi", "Hi", "", UNCLOSED),
        (THINK, "", "", "", UNCLOSED),
        (THINK, "<think>z</think>Hi<think>again</think>yo", "z", "", STRAY),
        (THINK, "<think>z</think>Hi</think>yo", "z", "", STRAY),
        (THINK, "<think>z</think>Hi<think>", "z", "", STRAY),
        (THINK, "<think>z</think></think>", "z", "", STRAY),
        (THINK, "<think>z</think>", "z", "", EMPTY),
        (THINK, "<think>z</think> \n\t\u00a0", "z", "", EMPTY),
        (THINK, "<think>z</think>\u200b\u200d\ufeff\x00\x07\u2060\ufe0f\u3164", "z", "", EMPTY),
        (THINK, "<think>z</think>.", "z", ".", OK),
        (THINK, "<think>z</think>\U0001f44d", "z", "\U0001f44d", OK),
        # think, opening prefilled
        (PRE, "plan</think>Hi", "plan", "Hi", OK),
        (PRE, "<think>plan</think>Hi", "plan", "Hi", OK),
        (PRE, "<think><think>plan</think>Hi", "<think>plan", "Hi", OK),
        (PRE, "</think>Hi", "", "Hi", OK),
        (PRE, "Hi", "Hi", "", UNCLOSED),
        (PRE, "z</think>a</think>b", "z", "", STRAY),
        (PRE, "z</think>", "z", "", EMPTY),
        # no_think
        (NO_THINK, " Hi \n", "", "Hi", OK),
        (NO_THINK, "1 < 2 and <b>", "", "1 < 2 and <b>", OK),
        (NO_THINK, "<think>z</think>Hi", "", "", STRAY),
        (NO_THINK, "z</think>Hi", "", "", STRAY),
        (NO_THINK, "Hi<think>", "", "", STRAY),
        (NO_THINK, " \u200b", "", "", EMPTY),
        (NO_THINK, "", "", "", EMPTY),
        # zero_think
        (ZERO, " <think> z </think> <response> Hi </response>", "z", "Hi", OK),
        (ZERO, "<think>z</think><response>Hi", "z", "Hi", OK),
        (ZERO, "<think>z</think><response>Hi</respon", "z", "Hi</respon", OK),
        (ZERO, "<think>z</think><response>Hi</response>\nUser: more", "z", "Hi", OK),
        (ZERO, "<think>a<response>b</response></think><response>Hi", "a<response>b</response>", "Hi", OK),
        (ZERO, "z</think><response>Hi</response>", "z", "", UNOPENED),
        (ZERO, "<think>z</think>Hi", "z", "", UNOPENED),
        (ZERO, "<think>z</think>so <response>Hi</response>", "z", "", UNOPENED),
        (ZERO, "<think>z</think><respon", "z", "", UNOPENED),
        (ZERO, "<think>z</think>", "z", "", UNOPENED),
        (ZERO, "<think>z <response>Hi</response>", "z <response>Hi</response>", "", UNCLOSED),
        (ZERO, "<think>z</think><response>Hi<think>y</think></response>", "z", "", STRAY),
        (ZERO, "<think>z</think><response><response>Hi</response>", "z", "", STRAY),
        (ZERO, "<think>z</think><response>Hi</response></response>", "z", "", STRAY),
        (ZERO, "<think>z</think><response>Hi</response><think>y", "z", "", STRAY),
        (ZERO, "<think>z</think><response> </response>", "z", "", EMPTY),
        (ZERO, "<think>z</think><response>", "z", "", EMPTY),
        (ZERO, "<think>z</think><response></response>Hi", "z", "", EMPTY),
        # zero_think, opening prefilled: the policy still writes the response tag
        (ZERO_PRE, " z </think> <response> Hi </response>", "z", "Hi", OK),
        (ZERO_PRE, "<think>z</think><response>Hi", "z", "Hi", OK),
        (ZERO_PRE, "z</think>Hi", "z", "", UNOPENED),
        (ZERO_PRE, "Hi</response>", "Hi</response>", "", UNCLOSED),
        # zero_no_think
        (ZERO_NO, "\n<response> Hi </response>", "", "Hi", OK),
        (ZERO_NO, "<response>Hi</response> bye", "", "Hi", OK),
        (ZERO_NO, "<response>Hi", "", "Hi", OK),
        (ZERO_NO, "Hi", "", "", UNOPENED),
        (ZERO_NO, "", "", "", UNOPENED),
        (ZERO_NO, "Hi <response>yo</response>", "", "", UNOPENED),
        (ZERO_NO, "<think>z</think><response>Hi</response>", "", "", STRAY),
        (ZERO_NO, "<response>Hi</response></think>", "", "", STRAY),
        (ZERO_NO, "<response>Hi<response>", "", "", STRAY),
        (ZERO_NO, "<response></response>", "", "", EMPTY),
        (ZERO_NO_PRE, " Hi </response>", "", "Hi", OK),
        (ZERO_NO_PRE, "<response>Hi", "", "Hi", OK),
        (ZERO_NO_PRE, "<response><response>Hi", "", "", STRAY),
        (ZERO_NO_PRE, "z</think>Hi", "", "", STRAY),
        (ZERO_NO_PRE, "", "", "", EMPTY),
    ],
)
def test_split_equals_result_by_hand(
    fmt: ThinkingFormat, text: str, thought: str, response: str, status: Status
) -> None:
    assert fmt.split(text) == Split(thought, response, status)


fragments = st.sampled_from(
    [*TAGS, "<think", "think>", "</think", "</", "<", ">", "</thin", "<respon", "</response", "<THINK>", "< think>"]
    + [
        "<think>\n",
        "\n</think>\n\n",
        " ",
        "\n",
        "Hi",
        "Assistant:",
        "\u200b",
        "\u3164",
        "\ufe0f",
        "\ud800",
        "\U0001f44d",
    ]
)
texts = st.lists(fragments | st.text(max_size=8), max_size=14).map("".join)
# Random text seldom passes the first rule, so half of all texts start with valid tags.
starts = st.sampled_from(["", "<think>", "<think>z</think>", "<think>z</think><response>", "<response>", "z</think>"])
completions = st.tuples(starts, texts).map("".join) | texts


def oracle(fmt: ThinkingFormat, text: str) -> Split:
    """The split rule as a state machine over a list of symbols, without string operations."""
    family = "</?(?:think|response)>" if fmt.zero else "</?think>"
    symbols = re.findall(f"{family}|[\\s\\S]", text)
    tags = [i for i, s in enumerate(symbols) if len(s) > 1]
    at, thought = 0, ""

    def skip(tag: str) -> bool:
        nonlocal at
        ahead = at
        while ahead < len(symbols) and symbols[ahead].isspace():
            ahead += 1
        if ahead == len(symbols) or symbols[ahead] != tag:
            return False
        at = ahead + 1
        return True

    if fmt.thinks:
        opened = skip("<think>")
        closes = [i for i in tags if symbols[i] == "</think>"]
        thought = "".join(symbols[at : min(closes, default=len(symbols))]).strip()
        if not closes:
            return Split(thought, "", Status.UNCLOSED)
        if not opened and not fmt.prefill:
            return Split(thought, "", Status.UNOPENED)
        at = closes[0] + 1
    elif fmt.zero and any(symbols[i] in ("<think>", "</think>") for i in tags):
        return Split("", "", Status.STRAY_TAG)
    if fmt.zero and not skip("<response>") and (fmt.thinks or not fmt.prefill):
        return Split(thought, "", Status.UNOPENED)
    left = [i for i in tags if i >= at]
    end = len(symbols)
    if fmt.zero and left and symbols[left[0]] == "</response>":
        end = left.pop(0)
    if left:
        return Split(thought, "", Status.STRAY_TAG)
    shown = symbols[at:end]
    if not any(map(leaves_ink, shown)):
        return Split(thought, "", Status.EMPTY_RESPONSE)
    return Split(thought, "".join(shown).strip(), Status.OK)


def leaves_ink(char: str) -> bool:
    kind = unicodedata.category(char)
    if kind in ("Co", "Cn"):
        return True
    return (
        char.isprintable() and char != " " and kind not in ("Mn", "Me") and char not in "\u115f\u1160\u2800\u3164\uffa0"
    )


@each_format
@settings(max_examples=200, deadline=None)
@given(text=completions)
def test_split_agrees_with_oracle(fmt: ThinkingFormat, text: str) -> None:
    split = fmt.split(text)
    assert split == oracle(fmt, text)
    assert split.status in set(Status)
    assert split.ok == bool(split.response)
    assert not any(tag in split.response for tag in fmt.tags)
    if split.ok and fmt.thinks:
        assert split.response in text[text.index("</think>") + len("</think>") :]


@st.composite
def texts_with_thoughts(draw: st.DrawFn) -> str:
    """Completions with the string QZQ only in thoughts: after an open tag or before a close tag."""
    plain = st.text(alphabet="ab \n<>/\u200b", max_size=4)
    pieces = [draw(starts)]
    for _ in range(draw(st.integers(1, 4))):
        opener, closer = draw(
            st.sampled_from(
                [("<think>", c) for c in ("</think>", "</thin", "", "<think>", "</response>")]
                + [(o, "</think>") for o in ("", "<thin", "</think>", "<response>", "</response>")]
            )
        )
        thought = f"{draw(plain)}QZQ{draw(plain)}"
        pieces += [draw(texts | st.just("")), opener, thought, closer, draw(st.sampled_from(["", "<response>", "Hi"]))]
    return "".join(pieces)


@each_format
@settings(max_examples=200, deadline=None)
@given(text=texts_with_thoughts())
def test_no_thought_reaches_the_response(fmt: ThinkingFormat, text: str) -> None:
    assert "QZQ" not in fmt.split(text).response


@pytest.mark.parametrize("fmt", THINKING)
def test_well_formed_thought_is_excluded_from_the_response(fmt: ThinkingFormat) -> None:
    split = fmt.split(fmt.target("QZQ <think> once more", "Hello"))
    assert "QZQ" in split.thought
    assert split.response == "Hello"


@pytest.mark.parametrize(
    ("fmt", "text"),
    [
        (THINK, "<think>\nz\n</think>\n\ny"),
        (PRE, "z\n</think>\n\ny"),
        (NO_THINK, "y"),
        (ZERO, "<think> z </think> <response> y </response>"),
        (ZERO_PRE, " z </think> <response> y </response>"),
        (ZERO_NO, "<response> y </response>"),
        (ZERO_NO_PRE, " y </response>"),
    ],
)
def test_target_equals_result_by_hand(fmt: ThinkingFormat, text: str) -> None:
    assert fmt.target(" z\n", "\ny ") == text


@each_format
@settings(max_examples=200, deadline=None)
@given(thought=texts, response=texts)
def test_split_is_the_inverse_of_target(fmt: ThinkingFormat, thought: str, response: str) -> None:
    tagged = any(tag in thought + " " + response for tag in TAGS)
    if not any(map(leaves_ink, response)) or (tagged and any(tag in response for tag in fmt.tags)):
        with pytest.raises(UserError, match="blank response"):
            fmt.target(thought, response)
    elif not tagged:
        expected = Split(thought.strip() if fmt.thinks else "", response.strip(), Status.OK)
        assert fmt.split(fmt.target(thought, response)) == expected


@pytest.mark.parametrize("fmt", THINKING)
def test_target_refuses_a_thought_that_closes_early(fmt: ThinkingFormat) -> None:
    with pytest.raises(UserError, match=r"</think>") as caught:
        fmt.target("I write </think> here", "Hello")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "thnik"}, r"'thnik' is unknown; use one of think, no_think, zero_think, zero_no_think"),
        ({"name": ["think"]}, "is unknown"),
        ({"name": "no_think", "prefill": True}, "no_think has no opening tag"),
        ({"prefill": "yes"}, "prefill is 'yes'"),
        ({"instruction": " "}, "instruction is ' '"),
        ({"instruction": 3}, "instruction is 3"),
        ({"name": "zero_think", "chat_template_kwargs": {"enable_thinking": True}}, "zero_think has no chat template"),
        ({"date": "31 Dec 2025"}, "date is '31 Dec 2025'; use a day as YYYY-MM-DD"),
        ({"date": None}, "date is None"),
    ],
)
def test_invalid_values_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        ThinkingFormat(**values)
    (tmp_path / FILE_NAME).write_text(json.dumps({"name": "think", "prefill": False, "instruction": None} | values))
    with pytest.raises(UserError, match=message) as caught:
        ThinkingFormat.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / FILE_NAME}: ")
    assert "\n" not in str(caught.value)


@each_format
@pytest.mark.parametrize("instruction", [None, "Denk nach, \u00e4ndere \U0001f9e0\nnichts."])
def test_file_round_trip(fmt: ThinkingFormat, instruction: str | None, tmp_path: Path) -> None:
    fmt = ThinkingFormat(fmt.name, fmt.prefill, instruction)
    fmt.save(tmp_path / "deep" / "folder")
    assert ThinkingFormat.load(str(tmp_path / "deep" / "folder")) == fmt
    assert ThinkingFormat.from_dict(fmt.to_dict()) == fmt
    assert set(fmt.to_dict()) == {field.name for field in fields(ThinkingFormat)}
    oldest = {name: value for name, value in fmt.to_dict().items() if name in ("name", "prefill", "instruction")}
    assert ThinkingFormat.from_dict(oldest) == fmt


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1]", "exactly the keys name, prefill, instruction, chat_template_kwargs, date; found a list"),
        (b'{"name": "think"}', "found name"),
        (
            b'{"name": "think", "prefill": false, "instruction": null, "tag": "x"}',
            "found name, prefill, instruction, tag",
        ),
        (b"{}", "found none"),
        (None, "cannot be read"),
    ],
)
def test_invalid_files_are_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        ThinkingFormat.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / FILE_NAME}: ")
    assert "\n" not in str(caught.value)


def test_import_does_not_load_transformers() -> None:
    code = "import sys, rlmt.formats.thinking; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
