"""Rule rewards, compared with scores computed by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rlmt.errors import UserError
from rlmt.rewards import CallableReward, FormatReward, LengthWindow, RegexReward, Reward
from rlmt.types import Prompt, Status

PROMPT = Prompt(0, [{"role": "user", "content": "hi"}], {"reference": ["Hi!"]})


def scores(reward: Reward, responses: list[str], statuses: list[Status] | None = None) -> list[float]:
    reward.check()
    got = reward.score([PROMPT] * len(responses), responses, statuses or [Status.OK] * len(responses))
    assert got.dtype == torch.float32
    assert got.shape == (len(responses),)
    return [float(value) for value in got]


def test_format_reward_is_one_only_for_ok() -> None:
    assert scores(FormatReward(), ["a"] * len(Status), list(Status)) == [float(s is Status.OK) for s in Status]
    assert scores(FormatReward(), []) == []


def test_length_window_decreases_linearly_outside() -> None:
    reward = LengthWindow(min_chars=10, max_chars=20, margin=8)
    lengths = [0, 2, 4, 9, 10, 15, 20, 21, 26, 28, 99]
    want = [0, 0, 0.25, 0.875, 1, 1, 1, 0.875, 0.25, 0, 0]
    assert scores(reward, ["x" * n for n in lengths]) == want
    assert scores(reward, [" \n" + "x" * 20 + "\n\n", "字" * 10]) == [1, 1]


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((5, 4, 1), "min_chars 5 is above max_chars 4"),
        ((-1, 4, 1), r"LengthWindow\.min_chars is -1: must be an integer of at least 0"),
        ((1, 4, 0), r"LengthWindow\.margin is 0: must be an integer above 0"),
    ],
)
def test_length_window_refuses_invalid_options(window: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LengthWindow(*window).check()


def test_regex_matches_anywhere_in_the_response() -> None:
    assert scores(RegexReward(r"(?i)\bthanks\b"), ["Many Thanks!", "thanksgiving", "no\nTHANKS"]) == [1, 0, 1]
    assert scores(RegexReward(r"^a.b$"), ["a\nb", "axb"]) == [0, 1]


def test_check_refuses_an_invalid_regex() -> None:
    with pytest.raises(UserError, match=r"reward 'polite': pattern '\(' is not a regular expression"):
        RegexReward("(", name="polite").check()


FUNCTIONS = """
import numpy as np

def length(prompt, response):
    prompt[0]["content"] += "!"
    return len(prompt[0]["content"]) * 100 + len(response)

def numpy_float(prompt, response):
    return np.float32(0.5)

def crash(prompt, response):
    raise KeyError("oops")

def nan(prompt, response):
    return float("nan")

def text(prompt, response):
    return "5"

def exact(prompt, response, extra):
    return float(response == extra["reference"].pop())

NUMBER = 7
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Import path of a module with user-defined functions."""
    (tmp_path / "my_reward_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_reward_functions", raising=False)
    return "my_reward_functions"


def test_callable_receives_prompt_and_response_and_cannot_change_the_prompt(functions: str) -> None:
    reward = CallableReward(f"{functions}.length")
    assert reward.name == "length"
    assert scores(reward, ["ab", ""]) == [302, 300]  # "hi!" each time
    assert PROMPT.messages == [{"role": "user", "content": "hi"}]
    assert scores(CallableReward(f"{functions}.numpy_float", name="half"), ["a"]) == [0.5]


def test_callable_with_a_parameter_extra_receives_the_row_and_cannot_change_it(functions: str) -> None:
    assert scores(CallableReward(f"{functions}.exact"), ["Hi!", "hi", "Hi!"]) == [1, 0, 1]
    assert PROMPT.extra == {"reference": ["Hi!"]}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("length", "'length' is not an import path"),
        ("no_such_module_here.f", "'no_such_module_here.f' cannot be imported"),
        ("my_reward_functions.missing", "'my_reward_functions.missing' cannot be imported"),
        ("my_reward_functions.NUMBER", "'my_reward_functions.NUMBER' is a int"),
    ],
)
def test_callable_must_be_importable(functions: str, path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CallableReward(path).check()


@pytest.mark.parametrize(("name", "value"), [("nan", "nan"), ("text", "'5'")])
def test_callable_must_return_a_finite_number(functions: str, name: str, value: str) -> None:
    long = "line\n" * 50
    with pytest.raises(UserError, match=f"{functions}.{name} returned {value} for the response 'line") as caught:
        scores(CallableReward(f"{functions}.{name}"), [long])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 220


def test_error_in_a_callable_names_it(functions: str) -> None:
    with pytest.raises(
        UserError, match=rf"{functions}.crash raised KeyError: 'oops' \(.*{functions}.py, line "
    ) as caught:
        scores(CallableReward(f"{functions}.crash"), ["ab" * 50])
    message = str(caught.value)
    assert "\n" not in message and "for the response 'ababab" in message and "ab" * 45 not in message
    assert "--ckpt_path last" in message
