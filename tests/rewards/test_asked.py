"""Rewards that ask: verdicts by hand, strict reading, failures, recorded answers, and what requests contain."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import Loopback, Reply, completion
from torch import nn

from rlmt.endpoints import Endpoint
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.rewards import (
    ClassifierReward,
    JudgeReward,
    PairwiseJudgeReward,
    RemoteReward,
    Reward,
    RubricReward,
    ServedReward,
    WeightedSum,
    score,
)
from rlmt.rewards.base import all_rewards
from rlmt.rewards.prompt_text import fill_template
from rlmt.rewards.rubric import read_answers
from rlmt.rewards.scoring import check_inputs, prefetch
from rlmt.rewards.verdicts import number_at_end, word_at_end
from rlmt.types import Prompt, Split, Status

EXTRA = {"reference": "See the tree", "rubric": ["one e", {"criterion": "two e", "weight": 3}], "label": 7}
PROMPT = Prompt(4, [{"role": "user", "content": "Say e"}], EXTRA)
OTHER = Prompt(9, [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "Hi"}], EXTRA)

Serve = Callable[[Callable[[str, Any], Reply]], Loopback]


def endpoint(server: Loopback, **options: Any) -> Endpoint:
    return Endpoint(server.url, "judge", max_attempts=2, **options)


@pytest.fixture
def loaded() -> Iterator[Callable[[Reward], Any]]:
    """Checks and loads a reward; closes it after the test."""
    rewards: list[Reward] = []

    def load(reward: Reward) -> Reward:
        reward.check()
        reward.load()
        rewards.append(reward)
        return reward

    yield load
    for reward in rewards:
        reward.close()


def parts(reward: Reward, prompts: list[Prompt], responses: list[str]) -> dict[str, list[float]]:
    _, found = reward.score_parts(prompts, responses, [Status.OK] * len(responses))
    return {name: [round(value, 6) for value in values.tolist()] for name, values in found.items()}


def test_judge_scores_are_those_of_the_last_line(scorer: Loopback, loaded: Any) -> None:
    reward = loaded(JudgeReward(endpoint(scorer), ledger=None))
    got = parts(reward, [PROMPT, PROMPT, OTHER], ["eee", "x {prompt} e", ""])
    assert got == {"judge": [4, 2, 1], "judge_unparsed": [0, 0, 0]}
    (question,) = [body["messages"][0]["content"] for body in scorer.bodies if "x {prompt} e" in str(body)]
    assert "<conversation>\nSay e\n</conversation>" in question and "from 1 (useless) to 10" in question
    assert any("user: Say\n\nassistant: Hi" in str(body["messages"][0]["content"]) for body in scorer.bodies)
    assert {body["model"] for body in scorer.bodies} == {"judge"}
    assert {body["temperature"] for body in scorer.bodies} == {0}
    assert reward.score([], [], []).shape == (0,)


def test_judge_averages_its_samples(serve: Serve, loaded: Any) -> None:
    scores = itertools.count(2)
    server = serve(lambda path, body: completion(f"Score: {next(scores)}"))
    reward = loaded(JudgeReward(endpoint(server), None, samples=4, temperature=1.0))
    assert parts(reward, [PROMPT], ["a"]) == {"judge": [3.5], "judge_unparsed": [0]}  # 2 3 4 5


def test_win_rate_is_over_both_orders_and_all_others(serve: Serve, loaded: Any) -> None:
    def script(path: str, body: Any) -> Reply:
        # A biased judge: the first response wins, unless the second is "best".
        text = body["messages"][0]["content"]
        return completion("Winner: " + ("B" if "<response_b>\nbest\n" in text else "A"))

    server = serve(script)
    reward = loaded(PairwiseJudgeReward(endpoint(server), None))
    prompts = [PROMPT, OTHER, PROMPT, PROMPT, PROMPT]
    got = parts(reward, prompts, ["best", "alone", "b", "c", "c"])
    # "best" wins all 6; b ties with each c by bias and loses to best: (0 + 0.5 + 0.5) / 3; equal texts tie unasked
    assert got == {"win_rate": [1, 0.5] + [round(1 / 3, 6)] * 3, "win_rate_unparsed": [0] * 5}
    # best with b and c, b with c, in both orders; the second c asks nothing new
    assert len({json.dumps(body) for body in server.bodies}) == 6


def test_win_rate_against_the_reference(scorer: Loopback, loaded: Any) -> None:
    reward = loaded(PairwiseJudgeReward(endpoint(scorer), None, reference_column="reference"))
    responses = ["eeeee", "eeee", "e", "See the tree"]  # the reference has five
    assert parts(reward, [PROMPT] * 4, responses)["win_rate"] == [0.5, 0, 0, 0.5]
    assert reward.columns == {"reference"}


@pytest.mark.parametrize("together", [True, False])
def test_rubric_score_is_the_weighted_share(scorer: Loopback, loaded: Any, together: bool) -> None:
    reward = loaded(RubricReward(endpoint(scorer), None, together=together))
    want = [0, 0.25, 1] if together else [0, 1, 1]  # the service says yes to criterion n if there are n letters e
    assert parts(reward, [PROMPT] * 3, ["", "e", "ee"])["rubric"] == want
    assert len(scorer.bodies) == (3 if together else 6)
    fixed = RubricReward(endpoint(scorer), None, items=["a", {"criterion": "b", "weight": 0.5}])
    assert parts(loaded(fixed), [PROMPT], ["e"])["rubric"] == [round(1 / 1.5, 6)]
    assert reward.columns == {"rubric"} and fixed.columns == set()


def test_remote_sends_prompt_and_response_apart(scorer: Loopback, loaded: Any) -> None:
    reward = loaded(RemoteReward(Endpoint(f"{scorer.url}/score"), batch_size=2, label_column="label"))
    assert parts(reward, [PROMPT, OTHER, PROMPT], ["e", "", "eee"]) == {"remote": [0.1, 0, 0.3]}
    assert scorer.paths == ["/score", "/score"]
    first = next(body for body in scorer.bodies if len(body["responses"]) == 2)
    assert first == {
        "query": ["Say ee", "user: Say\n\nassistant: Hi"],
        "prompts": ["Say e", "user: Say\n\nassistant: Hi"],
        "responses": ["e", ""],
        "messages": [PROMPT.messages, OTHER.messages],
        "labels": [7, 7],
    }


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"scores": [1]}, "answered no list `rewards` for 1 responses"),
        ({"rewards": [1, 2]}, "answered 2 rewards for 1 responses"),
        ({"rewards": ["5"]}, "answered the reward '5'; it must be a number"),
        ({"rewards": [True]}, "answered the reward 'True'"),
    ],
)
def test_invalid_answer_of_a_service_is_an_error(answer: Any, message: str, serve: Serve, loaded: Any) -> None:
    server = serve(lambda path, body: Reply(answer))
    with pytest.raises(UserError, match=message):
        loaded(RemoteReward(Endpoint(server.url))).score([PROMPT], ["a"], [Status.OK])


# Verdicts that cannot be read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 3", 3),
        ("clarity score: 9\nwhatever\n**Score:** 4.5 \n\n", 4.5),
        ("score: -1", -1),
        ("Score: 3/10", None),
        ("Score: 3 or 4", None),
        ("Score: 3\nThanks!", None),
        ("The final Score: 3", None),
        ("Score: ٣", None),
        ("", None),
    ],
)
def test_number_is_read_only_from_an_exact_last_line(text: str, score: float | None) -> None:
    assert number_at_end(text, "Score") == score


@pytest.mark.parametrize(
    ("text", "word"),
    [("x\nWinner: A", "a"), ("Winner: **Tie**.", "tie"), ("Winner: A or B", None), ("Winner: AB", None), ("A", None)],
)
def test_word_is_read_only_from_an_exact_last_line(text: str, word: str | None) -> None:
    assert word_at_end(text, "Winner", ("a", "tie", "b")) == word


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("1: no because\n1: yes\n2: **No**", (True, False)),
        ("1: yes\n3: no", None),
        ("2: yes\n1: yes", None),
        ("1: yes", None),
        ("1: yes\n2: maybe", None),
    ],
)
def test_criteria_are_read_only_from_exact_last_lines(text: str, answers: tuple[bool, ...] | None) -> None:
    assert read_answers(text, 2) == answers


def test_unreadable_verdict_is_asked_again_then_replaced_by_the_mean_of_the_group(serve: Serve, loaded: Any) -> None:
    def script(path: str, body: Any) -> Reply:
        text = body["messages"][0]["content"]
        if "<response>\nbroken\n" in text:
            return completion("Score: 99")  # not on the scale
        if "<response>\nlong\n" in text:
            return completion("Score: 1", finish="length" if body["temperature"] == 0 else "stop")
        return completion("Score: 8")

    server = serve(script)
    reward = loaded(JudgeReward(endpoint(server), None, attempts=3))
    got = parts(reward, [PROMPT, PROMPT, PROMPT, OTHER], ["broken", "long", "fine", "broken"])
    assert got == {"judge": [4.5, 1, 8, 5.5], "judge_unparsed": [1, 0, 0, 1]}
    asked = [body for body in server.bodies if "\nlong\n" in body["messages"][0]["content"]]
    assert [body["temperature"] for body in asked] == [0, 0.7]


def test_judge_that_never_gives_a_verdict_ends_the_run(serve: Serve, loaded: Any) -> None:
    server = serve(lambda path, body: completion("I would rather\nnot say."))
    with pytest.raises(
        UserError, match="'judge': none of 8 verdicts of judge can be read, .*'I would rather not say.'"
    ):
        loaded(JudgeReward(endpoint(server), None)).score([PROMPT] * 8, list("abcdefgh"), [Status.OK] * 8)


# Failures and recorded answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply({}, 500), "no answer in 2 attempts .*; start it, and resume with --ckpt_path last"),
        (Reply({}, 404), "--ckpt_path last"),
        (Reply({"error": {"message": "too long"}}, 400), "the request was refused .status 400"),
        (Reply({"no": "choices"}), "no answer in 2 attempts .the answer has no choices: .'no': 'choices'"),
        (Reply({"choices": [3]}), "the answer is not a chat completion; check base_url"),
    ],
)
def test_failing_endpoint_is_an_error_and_never_a_score(reply: Reply, message: str, serve: Serve, loaded: Any) -> None:
    reward = loaded(JudgeReward(endpoint(serve(lambda path, body: reply)), None))
    prefetch(reward, [PROMPT], [Split("t", "a", Status.OK)], [""], "penalty")  # does not raise
    with pytest.raises(UserError, match=message) as caught:
        score(reward, [PROMPT], [Split("t", "a", Status.OK)], [""])
    assert "\n" not in str(caught.value)


def test_requests_start_before_scores_are_wanted_and_are_sent_once(scorer: Loopback, loaded: Any) -> None:
    judge = loaded(JudgeReward(endpoint(scorer), None))
    both = WeightedSum([judge, RemoteReward(Endpoint(scorer.url))], [1.0, 1.0])
    both.parts[1].load()
    splits = [Split("t", "ee", Status.OK), Split("", "", Status.UNCLOSED)]
    assert prefetch(both, [PROMPT] * 2, splits, ["<think>t</think>ee", "<think>"], "penalty")
    futures = [future for part in both.parts for pending in part._pending.values() for future in pending]
    assert [len(future.result()) for future in futures] == [1, 1]
    got = score(both, [PROMPT] * 2, splits, ["<think>t</think>ee", "<think>"])
    assert got.total.tolist() == pytest.approx([3.2, -10])
    assert len(scorer.bodies) == 2
    both.parts[1].close()


def test_recorded_verdicts_are_reused(scorer: Loopback, loaded: Any, tmp_path: Path) -> None:
    ledger = str(tmp_path / "new" / "judge.jsonl")
    first = loaded(JudgeReward(endpoint(scorer), ledger, samples=2, temperature=1.0))
    want = parts(first, [PROMPT] * 2, ["e", "ee"])
    first.close()
    moved = Endpoint("http://127.0.0.1:9/nobody", "judge", max_attempts=1)
    again = loaded(JudgeReward(moved, ledger, samples=2, temperature=1.0))
    assert parts(again, [PROMPT] * 2, ["e", "ee"]) == want
    assert len(scorer.bodies) == 4


def test_every_rank_has_a_ledger_of_its_own(tmp_path: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlmt.distributed.collectives.world_size", lambda: 2)
    monkeypatch.setattr("rlmt.distributed.collectives.rank", lambda: 1)
    loaded(JudgeReward(Endpoint("http://127.0.0.1:9/v1"), str(tmp_path / "judge.jsonl")))
    assert [path.name for path in tmp_path.iterdir()] == ["judge.rank1.jsonl"]


# Requests ------------------------------------------------------------------------------------------------------------

TAGS = ["<think>", "</think>", "<response>", "</response>", " ", "\n", "x"]
SENTINEL = "⟦secret⟧"


@pytest.fixture
def every_reward(scorer: Loopback, loaded: Any, reward_model: Callable[..., str]) -> nn.ModuleList:
    """One reward of each class that asks."""
    plain = Endpoint(scorer.url)
    rewards = [
        JudgeReward(endpoint(scorer), None),
        PairwiseJudgeReward(endpoint(scorer), None, reference_column="reference"),
        PairwiseJudgeReward(endpoint(scorer), None, name="group"),
        RubricReward(endpoint(scorer), None),
        RemoteReward(plain),
        ServedReward(reward_model(), [plain]),
    ]
    return nn.ModuleList([loaded(reward) for reward in rewards])


def test_no_thought_is_in_any_request(every_reward: nn.ModuleList, scorer: Loopback) -> None:
    served: Any = every_reward[5]
    tokenizer = served._classifier[0]._loaded_reader.tokenizer

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        name=st.sampled_from(["think", "zero_think"]),
        thought=st.lists(st.sampled_from(["<think>", "<response>", "\n", "y"]), max_size=3),
        after=st.lists(st.sampled_from(TAGS), max_size=6),
        closed=st.booleans(),
        prefill=st.booleans(),
        mode=st.sampled_from(["penalty", "null"]),
    )
    def check(name: Any, thought: list[str], after: list[str], closed: bool, prefill: bool, mode: Any) -> None:
        opening = "" if prefill else "<think>"
        text = opening + "".join(thought) + SENTINEL + ("</think>" + "".join(after) if closed else "")
        splits = [ThinkingFormat(name, prefill=prefill).split(text), Split("", "plain", Status.OK)]
        scorer.bodies.clear()
        prefetch(every_reward, [PROMPT] * 2, splits, [text, "plain"], mode)
        for reward in every_reward:
            score(reward, [PROMPT] * 2, splits, [text, "plain"], mode)  # type: ignore[arg-type]
        assert len(scorer.bodies) >= 6
        for body in scorer.bodies:
            tokens = [tokenizer.decode(ids) for ids in body.get("input", [])]
            assert SENTINEL not in json.dumps([body, tokens], ensure_ascii=False)

    check()


def test_rewards_that_ask_refuse_to_score_complete_texts(every_reward: nn.ModuleList) -> None:
    check_inputs(every_reward, "penalty", ["reference", "rubric"])
    with pytest.raises(UserError, match="score_all, which would send thoughts to the service of reward 'judge'"):
        check_inputs(every_reward, "score_all", ["reference", "rubric"])
    with pytest.raises(
        UserError, match="--data.extra_columns does not have 'reference', which reward 'win_rate' reads"
    ):
        check_inputs(every_reward, "penalty", ["rubric"])


def test_template_is_filled_in_one_pass() -> None:
    template = '{"a": 1} {prompt} {response} {reference} {rubric}'
    got = fill_template(template, PROMPT, {"response": "{reference} {prompt}"}, "judge")
    checklist = '["one e", {"criterion": "two e", "weight": 3}]'
    assert got == f'{{"a": 1}} Say e {{reference}} {{prompt}} See the tree {checklist}'
    empty = Prompt(2, PROMPT.messages, {"reference": None})
    with pytest.raises(UserError, match="reward 'judge': row 3 has no 'reference'; fill it in"):
        fill_template(template, empty, {"response": ""}, "judge")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (JudgeReward, {"low": 3, "high": 3}, "low 3 is not below high 3"),
        (JudgeReward, {"template": "{prompt}"}, "template does not contain {response}"),
        (JudgeReward, {"samples": 2}, "samples is 2, but at temperature 0 all are the same"),
        (PairwiseJudgeReward, {"template": "{response_a}"}, "template does not contain {response_b}"),
        (RubricReward, {"template": "{response}"}, "template does not contain {criteria}"),
        (RubricReward, {"items": []}, "items is no checklist"),
        (RubricReward, {"items": [{"weight": 1}]}, "items has a criterion without text"),
        (
            RubricReward,
            {"items": [{"criterion": "a", "weight": -1}]},
            "items: the weight of 'a' is -1; use a number above 0",
        ),
    ],
)
def test_invalid_options_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"reward '.*': {message}"):
        kind(Endpoint("http://127.0.0.1:9/v1"), None, **options).check()


# A served classifier -------------------------------------------------------------------------------------------------


def serve_classifier(folder: str, serve: Serve, activation: Callable[[Any], bool]) -> Loopback:
    """A loopback server with the interface of vLLM's pooling server, around the model in `folder`."""
    model = ClassifierReward(folder)
    model.load()

    def script(path: str, body: Any) -> Reply:
        with torch.no_grad():
            scores = model._forward(body["input"]).double()
        if activation(body):
            scores = scores.sigmoid()
        data = [{"index": i, "probs": [value]} for i, value in enumerate(scores.tolist())]
        return Reply({"data": data[::-1]})

    return serve(script)


def test_served_scores_equal_those_in_process(serve: Serve, loaded: Any, reward_model: Callable[..., str]) -> None:
    folder = reward_model()
    servers = [serve_classifier(folder, serve, lambda body: body["use_activation"]) for _ in range(2)]
    endpoints = [Endpoint(server.url, "rm") for server in servers]
    reward = loaded(ServedReward(folder, endpoints, max_length=60, batch_size=2))
    local = loaded(ClassifierReward(folder, max_length=60))
    responses = ["yes", "a much longer response " * 9, "<|eot|>no", "", "fine"]
    prompts = [PROMPT, OTHER, PROMPT, PROMPT, OTHER]
    statuses = [Status.OK] * 5
    with pytest.warns(UserWarning, match="is truncated"):
        want = local.score(prompts, responses, statuses)
        got = reward.score(prompts, responses, statuses)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert [len(server.bodies) for server in servers] == [4, 3]  # two probes each; three requests in turn
    assert all(body["model"] == "rm" for server in servers for body in server.bodies)
    assert not list(reward.parameters()) and all_rewards(reward) == [reward], "no reward model of this process"


@pytest.mark.parametrize("always", [True, False])
def test_server_that_ignores_the_activation_is_refused(
    always: bool, serve: Serve, reward_model: Callable[..., str]
) -> None:
    folder = reward_model()
    server = serve_classifier(folder, serve, lambda body: always)
    with pytest.raises(UserError, match="does not return logits when asked with use_activation false"):
        ServedReward(folder, [Endpoint(server.url)]).load()


def test_answer_that_is_no_classification_is_an_error(serve: Serve, reward_model: Callable[..., str]) -> None:
    for answer, message in (({}, "has no scores"), ({"data": [{"index": 0, "probs": [1, 2]}]}, "2 scores for 3")):
        server = serve(lambda path, body, answer=answer: Reply(answer))
        reward = ServedReward(reward_model(), [Endpoint(server.url)])
        with pytest.raises(UserError, match=message):
            reward.load()
        reward.close()
