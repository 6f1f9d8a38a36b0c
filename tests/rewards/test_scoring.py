"""The text that a reward sees, and the scores of malformed samples."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlmt.errors import UserError
from rlmt.formats.thinking import FormatName, ThinkingFormat
from rlmt.rewards import ClassifierReward, FormatReward, MalformedMode, Reward, WeightedSum, score
from rlmt.types import Message, Prompt, Split, Status

SENTINEL = "⟦secret⟧"


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


class Recorder(Reward):
    """Returns the passed scores, or the length of each response, and records its input."""

    name = "recorder"

    def __init__(self, values: Sequence[float] | None = None) -> None:
        super().__init__()
        self.values = values
        self.seen: list[tuple[str, str, Status]] = []

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        self.seen = [
            (prompt.messages[-1]["content"], response, status)
            for prompt, response, status in zip(prompts, responses, statuses, strict=True)
        ]
        return torch.tensor([float(len(r)) for r in responses] if self.values is None else self.values)


SPLITS = [
    Split("t0", "abc", Status.OK),
    Split("t1", "", Status.UNCLOSED),
    Split("t2", "a", Status.OK),
    Split("t3", "", Status.STRAY_TAG),
]
TEXTS = ["<think>t0</think>abc", "<think>t1", "<think>t2</think>a", "<think>t3</think>x</think>y"]
PROMPTS = [Prompt(i, user(f"p{i}")) for i in range(4)]


def test_penalty_hides_malformed_samples_from_the_reward() -> None:
    reward = Recorder()
    got = score(reward, PROMPTS, SPLITS, TEXTS)
    assert reward.seen == [("p0", "abc", Status.OK), ("p2", "a", Status.OK)]
    assert got.total.tolist() == [3, -10, 1, -10]
    assert got.total.dtype == torch.float32
    assert got.texts == ["abc", None, "a", None]
    assert got.parts["recorder"][[0, 2]].tolist() == [3, 1]
    assert got.parts["recorder"].isnan().tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("values", "penalty", "want"),
    [([-30.0, 5.0], -10, [-30, -30, 5, -30]), ([-2.0, 5.0], -10, [-2, -10, 5, -10]), ([4.0, 5.0], 7, [4, 4, 5, 4])],
)
def test_malformed_sample_never_scores_above_a_well_formed_one(
    values: list[float], penalty: float, want: list[float]
) -> None:
    assert score(Recorder(values), PROMPTS, SPLITS, TEXTS, "penalty", penalty).total.tolist() == want


def test_batch_without_well_formed_samples_gets_the_penalty() -> None:
    got = score(WeightedSum([Recorder(), FormatReward()], [1.0, 1.0]), PROMPTS[:2], [SPLITS[1]] * 2, TEXTS[:2])
    assert got.total.tolist() == [-10, -10]
    assert sorted(got.parts) == ["format", "format_share", "recorder", "recorder_share"]
    assert all(part.isnan().all() for part in got.parts.values())


def test_scores_are_float32_for_any_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = score(Recorder([1.0, 1.25]), PROMPTS, SPLITS, TEXTS, penalty=-10)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.total.dtype == got.parts["recorder"].dtype == torch.float32


def test_null_mode_scores_a_literal() -> None:
    reward = Recorder()
    got = score(reward, PROMPTS, SPLITS, TEXTS, "null")
    assert got.texts == ["abc", "[NULL]", "a", "[NULL]"]
    assert [seen[2] for seen in reward.seen] == [s.status for s in SPLITS]
    assert got.total.tolist() == [3, 6, 1, 6]
    assert got.parts["recorder"].tolist() == [3, 6, 1, 6]


def test_score_all_scores_complete_text_only_of_malformed_samples() -> None:
    got = score(Recorder(), PROMPTS, SPLITS, TEXTS, "score_all")
    assert got.texts == ["abc", TEXTS[1], "a", TEXTS[3]]
    assert got.total.tolist() == [3, 9, 1, 27]


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(UserError, match="'strict', which is unknown; use penalty, null or score_all"):
        score(Recorder(), PROMPTS, SPLITS, TEXTS, "strict")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, float("nan")], "reward 'recorder' returned 1 of 2 scores that are not finite"),
        ([float("inf"), float("nan")], "returned 2 of 2 scores"),
        ([1.0], r"reward 'recorder' returned scores of shape \[1\] for 2 responses"),
    ],
)
def test_error_for_invalid_scores_names_the_reward(values: list[float], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        score(Recorder(values), PROMPTS, SPLITS, TEXTS)


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="3 prompts, 4 splits and 4 texts"):
        score(Recorder(), PROMPTS[:3], SPLITS, TEXTS)


# ------------------------------------------------------------------------- the exact text scored, by format and status

GOLDEN = [
    ("think", "<think>\nT\n</think>\n\nHello.", Status.OK, "Hello."),
    ("think", "<think>T", Status.UNCLOSED, None),
    ("think", "T</think>Hello.", Status.UNOPENED, None),
    ("think", "<think>T</think>Hello.<think>T", Status.STRAY_TAG, None),
    ("think", "<think>T</think> \n", Status.EMPTY_RESPONSE, None),
    ("no_think", " Hello.\n", Status.OK, "Hello."),
    ("no_think", "Hello.<think>T</think>", Status.STRAY_TAG, None),
    ("no_think", "", Status.EMPTY_RESPONSE, None),
    ("zero_think", "<think> T </think> <response> Hello. </response>", Status.OK, "Hello."),
    ("zero_think", "<think> T </think> <response> Hello.", Status.OK, "Hello."),
    ("zero_think", "<think> T", Status.UNCLOSED, None),
    ("zero_think", "<think> T </think> Hello.", Status.UNOPENED, None),
    ("zero_think", "<think> T </think> <response> a <think> T </response>", Status.STRAY_TAG, None),
    ("zero_think", "<think> T </think> <response> </response>", Status.EMPTY_RESPONSE, None),
    ("zero_no_think", "<response> Hello. </response>", Status.OK, "Hello."),
    ("zero_no_think", "Hello.", Status.UNOPENED, None),
    ("zero_no_think", "<think> T </think> <response> Hello. </response>", Status.STRAY_TAG, None),
    ("zero_no_think", "<response></response>", Status.EMPTY_RESPONSE, None),
]


@pytest.mark.parametrize(("name", "text", "status", "response"), GOLDEN)
@pytest.mark.parametrize("mode", get_args(MalformedMode))
def test_scored_text_equals_golden_text(
    reward_model: Callable[..., str],
    name: FormatName,
    text: str,
    status: Status,
    response: str | None,
    mode: MalformedMode,
) -> None:
    split = ThinkingFormat(name, instruction="Think first.").split(text)
    assert split.status is status
    reward = ClassifierReward(reward_model())
    (shown,) = score(Recorder(), [Prompt(0, user("Hi"))], [split], [text], mode).texts
    want = response if response is not None else {"penalty": None, "null": "[NULL]", "score_all": text}[mode]
    assert shown == want
    if shown is not None:
        assert reward.render(user("Hi"), shown) == f"[user]Hi<|eot|>[assistant]{want}<|eot|>"


TAGS = ["<think>", "</think>", "<response>", "</response>", "<", "think>", " ", "\n", "x"]


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(["think", "zero_think"]),
    thought=st.lists(st.sampled_from(["<think>", "<response>", "</response>", "\n", "y"])),
    after=st.lists(st.sampled_from(TAGS)),
    closed=st.booleans(),
    opened=st.booleans(),
    prefill=st.booleans(),
    mode=st.sampled_from(["penalty", "null"]),
)
def test_no_thought_reaches_a_reward(
    name: FormatName,
    thought: list[str],
    after: list[str],
    closed: bool,
    opened: bool,
    prefill: bool,
    mode: MalformedMode,
) -> None:
    text = "<think>" * opened + "".join(thought) + SENTINEL
    if closed:
        text += "</think>" + "".join(after)
    split = ThinkingFormat(name, prefill=prefill).split(text)
    reward = Recorder()
    got = score(reward, [Prompt(0, user("p"))], [split], [text], mode)
    assert SENTINEL not in "".join(shown or "" for shown in got.texts)
    assert SENTINEL not in "".join(response for _, response, _ in reward.seen)
    assert got.texts[0] is None or mode == "null" or split.ok


# ----------------------------------------------------------------------------------------------------- several ranks


RANK = """
import sys
import torch
from torch import distributed
from rlmt.rewards import Reward, score
from rlmt.types import Prompt, Split, Status

class Fixed(Reward):
    def score(self, prompts, responses, statuses):
        return torch.tensor([VALUE])

rank, store = int(sys.argv[1]), sys.argv[2]
VALUE = [-20.0, 3.0][rank]
distributed.init_process_group("gloo", f"file://{store}", world_size=2, rank=rank)
splits = [Split("", "a", Status.OK), Split("", "", Status.UNCLOSED)]
print(score(Fixed(), [Prompt(0, [])] * 2, splits, ["", ""]).total.tolist(), flush=True)
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_lowest_score_is_taken_over_all_ranks(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].decode().strip() for process in ranks]
    assert outputs == ["[-20.0, -20.0]", "[3.0, -20.0]"]


def test_error_in_a_users_class_names_its_line() -> None:
    class Broken(Recorder):
        def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
            return torch.tensor([1 / len(response[3:]) for response in responses])

    expected = (
        r"reward 'recorder' raised ZeroDivisionError: division by zero \(.*test_scoring.py, line \d+: return torch"
    )
    with pytest.raises(UserError, match=expected) as caught:
        score(Broken(), PROMPTS, SPLITS, TEXTS)
    assert "\n" not in str(caught.value) and str(caught.value).endswith("--ckpt_path last.")


def test_error_in_a_users_class_names_its_calls_and_the_response() -> None:
    def points(text: str) -> float:
        return float(text)

    class Broken(Recorder):
        def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
            scores = []
            for text in responses:
                scores.append(points(text))
            return torch.tensor(scores)

    texts = ["1", "2" + "x" * 200, "3"]
    splits = [Split("", text, Status.OK) for text in texts]
    with pytest.raises(UserError) as caught:
        score(Broken(), [Prompt(0, [])] * 3, splits, texts)
    message = str(caught.value)
    calls = r"test_scoring.py, line \d+: return float\(text\); called in .*: scores.append\(points\(text\)\)\)"
    assert re.search(calls, message), message
    assert f"for the response '2{'x' * 75}..." in message and "x" * 80 not in message.partition("for the response")[2]
    assert "torch/" not in message and "src/rlmt" not in message
