"""Options of an endpoint, and what is read from answers."""

from __future__ import annotations

from typing import Any

import pytest

from rlmt.endpoints import Call, ChatAnswer, Endpoint, Usage
from rlmt.errors import UserError

URL = "http://127.0.0.1:8000/v1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "api.openai.com"}, "base_url is 'api.openai.com': give a URL such as"),
        ({"base_url": "https://user:sk-1@host/v1"}, "base_url contains a user name or a query"),
        ({"base_url": f"{URL}?key=sk-1"}, "base_url contains a user name or a query"),
        ({"api_key_variable": "sk-1"}, "api_key_variable is not the name of an environment variable"),
        ({"max_in_flight": 0}, "Endpoint.max_in_flight is 0: must be an integer above 0."),
        ({"input_price": -1.0}, "Endpoint.input_price is -1.0: must be a number of at least 0."),
    ],
)
def test_invalid_options_are_refused_without_repeating_a_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Endpoint(**{"base_url": URL} | options)
    assert str(error.value).startswith(message) and "sk-1" not in str(error.value)


def test_check_names_option_and_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(UserError, match=r"^--teacher\.api_key_variable: the environment variable SOME_KEY is not set"):
        Endpoint(URL, api_key_variable="SOME_KEY").check("--teacher")
    with pytest.raises(UserError, match=r"^--teacher\.max_cost needs prices; set --teacher\.input_price and"):
        Endpoint(URL, max_cost=5.0, input_price=1.0).check("--teacher")
    monkeypatch.setenv("SOME_KEY", "k")
    Endpoint(URL, api_key_variable="SOME_KEY", max_cost=5.0, input_price=1.0, output_price=2.0).check("--teacher")


def test_call_key_depends_on_path_body_and_sample() -> None:
    call = Call("/a", {"x": 1, "y": [2]})
    assert call.key == Call("/a", {"y": [2], "x": 1}).key
    others = [Call("/b", {"x": 1, "y": [2]}), Call("/a", {"x": 1, "y": [3]}), Call("/a", {"x": 1, "y": [2]}, 1)]
    assert len({call.key, *(other.key for other in others)}) == 4


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"content": 3}}]}])
def test_malformed_completion_is_a_value_error(answer: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ChatAnswer.from_json(answer)


def test_missing_text_is_empty() -> None:
    answer = {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]}
    assert ChatAnswer.from_json(answer) == ChatAnswer("", "content_filter")


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}, (7, 5)),
        ({"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 112}, (7, 105)),
        ({"prompt_tokens": 7, "total_tokens": 7}, (7, 0)),
        ({"prompt_tokens": "7"}, (0, 0)),
        (None, (0, 0)),
    ],
)
def test_hidden_thinking_is_billed(usage: Any, tokens: tuple[int, int]) -> None:
    assert Usage.from_json({"usage": usage}) == Usage(*tokens)
