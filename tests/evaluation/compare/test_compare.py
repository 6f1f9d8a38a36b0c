"""`rlmt compare` with policies and judges on a loopback server."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopback import Loopback, Reply, completion
from processes import run_in_process
from safetensors.torch import load_file, save_file

from rlmt.cli.commands import main
from rlmt.endpoints import Endpoint
from rlmt.evaluation.compare.judge import JudgeQuestion, Verdicts
from rlmt.evaluation.compare.pairs import Pair
from rlmt.evaluation.compare.rubric import Rubric
from rlmt.evaluation.statistics import bootstrap_mean
from rlmt.formats.thinking import FormatName, ThinkingFormat
from rlmt.rewards.pairwise import TEMPLATE
from rlmt.types import Message, Prompt

from .conftest import SECRET, Models, Setting

Make = Callable[[Models, int], Setting]
Serve = Callable[[Callable[[str, Any], Reply]], Loopback]
Exported = Callable[[str], Path]

WINS = 28
"""Of 40 prompts, those that the scripted judge gives to the policy `new`."""


def fair_judge(question: str, body: Any) -> str:
    """Prefers `new` on 28 prompts, `old` on 10 and none on 2, whatever the order; knows two criteria."""
    number = int(re.findall(r"Answer (\d+)", question)[0])
    if "<criteria>" in question:
        return f"1: yes\n2: {'yes' if 'by new' in question and number % 2 else 'no'}"
    if number >= WINS + 10:
        return "Alike.\n**Winner: tie**"
    shown = re.findall(r"by (new|old)", question)
    return f"Clear.\nWinner: {'AB'[shown.index('new' if number < WINS else 'old')]}"


def test_known_win_rate_is_found_by_judge_rubric_and_reward_at_once(
    setting: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    found = setting(Models(fair_judge, malformed=frozenset({("new", 0), ("new", 1), ("old", 1)})), 40)
    reward = '[{"class_path": "rlmt.rewards.RegexReward", "init_args": {"pattern": "by new", "name": "names_new"}}]'
    assert main(found.arguments("compare", "--rubric", "rubric", "--rewards", reward)) == 0
    judge, rubric, names_new = found.result()["lines"]
    # Prompt 0 is lost and 1 is a tie by form; 26 of the 38 others are won, 10 lost, 2 tie.
    assert (judge["wins"], judge["ties"], judge["losses"]) == pytest.approx((26 / 40, 3 / 40, 11 / 40))
    assert judge["win_rate"]["low"] < 0.7 < judge["win_rate"]["high"]
    assert judge["consistency"] == 1.0 and judge["first_share"] == 0.5
    assert rubric["means"] == pytest.approx([0.5 + 0.5 * 19 / 38, 0.5])
    assert names_new["wins"] == pytest.approx(38 / 40) and names_new["means"] == [1.0, 0.0]
    assert found.result()["malformed"] == {"new": 2, "old": 1}
    printed = capsys.readouterr().out
    assert "judge: new is better than old" in printed and "most won by new:" in printed
    verdicts = pyarrow.parquet.read_table(found.folder / "out/verdicts.parquet").to_pylist()
    assert len(verdicts) == 2 * 38 and {row["winner"] for row in verdicts} == {"a", "b", "tie"}
    assert [row["winner"] for row in verdicts if row["prompt"] == 2] == ["a", "a"]
    assert all(row["winner"] == "b" for row in verdicts if WINS <= row["prompt"] < WINS + 10)


def test_judge_never_sees_a_thought_or_a_malformed_output(setting: Make) -> None:
    models = Models(fair_judge, malformed=frozenset({("new", 3)}))
    found = setting(models, 6)
    assert main(found.arguments("compare", "--rubric", "rubric")) == 0
    assert len(models.asked) == 5 * 4 and not any(SECRET in text for text in models.asked)
    assert not any("prompt 3" in text for text in models.asked)
    bodies = [body for body in found.server.bodies if body["model"] == "judge"]
    assert not any(SECRET in str(body) for body in bodies)


def test_judge_that_always_answers_a_is_exposed(setting: Make, capsys: pytest.CaptureFixture[str]) -> None:
    found = setting(Models(lambda question, body: "I see.\nWinner: A"), 10)
    assert main(found.arguments("compare")) == 0
    (judge,) = found.result()["lines"]
    assert (judge["wins"], judge["ties"], judge["consistency"], judge["first_share"]) == (0.0, 1.0, 0.0, 1.0)
    assert (
        "prefers the response that it is shown first (100.0 % of its choices): do not trust" in capsys.readouterr().out
    )


def test_stopped_comparison_asks_nothing_twice(setting: Make, capsys: pytest.CaptureFixture[str]) -> None:
    models = Models()

    def failing(question: str, body: Any) -> str:
        if len(models.asked) >= 7:
            raise ConnectionResetError
        return fair_judge(question, body)

    models.judge = failing
    found = setting(models, 10)
    command = found.arguments("compare", "--judge.max_in_flight", "1", "--judge.max_attempts", "1")
    assert main(command) == 2
    assert "run the same command again: it continues where it stopped" in capsys.readouterr().err
    models.judge = fair_judge
    assert main(command) == 0 and main(command) == 0
    assert len(models.asked) == len(set(models.asked)) == 20
    policies = [body for body in found.server.bodies if body["model"] != "judge"]
    assert len(policies) == 20
    assert found.result()["lines"][0]["wins"] == 1.0


@pytest.mark.slow
def test_comparison_killed_in_generation_and_in_judging_gives_the_same_table_and_asks_nothing_twice(
    serve: Serve, exported: Exported, prompts_file: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(exported("no_think"), tmp_path / "old")
    weights = load_file(old / "model.safetensors")
    save_file({n: w * 1.1 for n, w in weights.items()}, old / "model.safetensors", metadata={"format": "pt"})
    server = serve(lambda path, body: completion(f"Winner: {'AB'[sum(str(body).encode()) % 2]}"))

    def words(out: Path) -> list[str]:
        judge = ["--judge.base_url", f"{server.url}/v1", "--judge.model", "judge", "--judge.max_in_flight", "1"]
        judge += ["--judge.api_key_variable", "PLANTED_KEY", "--yes"]
        options = ["--prompts", str(prompts_file), "--engine", "TransformersEngine", "--max_new_tokens", "40"]
        return ["compare", f"new={exported('no_think')}", f"old={old}", "--out", str(out), *options, *judge]

    out = tmp_path / "killed"
    parts = {name: out / "completions" / name / "part-00000.parquet" for name in ("new", "old")}
    assert run_in_process(words(out), parts["new"].exists) == -signal.SIGKILL
    assert not parts["old"].exists() and not server.bodies
    written = parts["new"].stat().st_mtime_ns
    assert run_in_process(words(out), lambda: len(server.bodies) >= 5) == -signal.SIGKILL
    assert parts["new"].stat().st_mtime_ns == written and not (out / "comparison.json").exists()
    answered = (out / "judge.jsonl").read_text().split("\n")[:-1]
    assert run_in_process(words(out)) == 0
    recorded = (out / "judge.jsonl").read_text().split("\n")[:-1]
    assert recorded[: len(answered)] == answered and len(recorded) == len(set(recorded)) > len(answered) > 0
    assert len(server.bodies) - len(recorded) <= 1  # an answer under way when the process was killed

    asked = len(server.bodies)
    assert run_in_process(words(tmp_path / "whole")) == 0
    assert len(server.bodies) - asked == len(recorded)
    for name in ("comparison.json", "comparison.md", "verdicts.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_rewards_alone_need_no_endpoint(setting: Make) -> None:
    reward = '[{"class_path": "rlmt.rewards.RegexReward", "init_args": {"pattern": "Answer [0-2] by new"}}]'
    models = Models()
    found = setting(models, 12)
    assert main(found.arguments("compare", "--rewards", reward, judge=False)) == 0
    (line,) = found.result()["lines"]
    assert (line["name"], line["wins"], line["ties"], line["means"]) == ("regex", 0.25, 0.75, [0.25, 0.0])
    assert not models.asked


def test_repeated_comparison_writes_the_same_file(setting: Make, tiny: Path) -> None:
    reward = [{"class_path": "rlmt.rewards.ClassifierReward", "init_args": {"model": str(tiny / "reward")}}]
    found = setting(Models(), 3)
    command = found.arguments("compare", "--rewards", json.dumps(reward), judge=False)
    written = []
    for _ in range(2):  # the second one reads the scores and loads no reward
        assert main(command) == 0
        written.append(found.result())
    assert written[0] == written[1] and written[0]["settings"]["rewards"][0][0]["source"] == str(tiny / "reward")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing compares the responses"),
        (["--rubric", "rubric"], "--rubric: a judge checks the criteria"),
        (
            ["--rewards", '[{"class_path": "RegexReward", "init_args": {"pattern": "("}}]'],
            "is not a regular expression",
        ),
        (["--rewards", '["FormatReward", "FormatReward"]'], "two lines are named 'format'"),
        (
            [
                "--rewards",
                '[{"class_path": "WeightedSum", "init_args": {"rewards": ["FormatReward"], "weights": [1], '
                '"scale": ["batch_std"]}}]',
            ],
            "set its scale to none",
        ),
    ],
)
def test_option_error_is_one_line_before_anything_is_generated(
    more: list[str], message: str, setting: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    found = setting(Models(), 2)
    assert main(found.arguments("compare", *more, judge=False)) == 2
    error = capsys.readouterr().err
    assert message in error and error.strip().count("\n") == 0 and error.strip().endswith(".")
    assert not found.server.bodies


def test_model_is_not_compared_with_itself(setting: Make, capsys: pytest.CaptureFixture[str]) -> None:
    found = setting(Models(), 2)
    words = found.arguments("compare")
    words[3:5] = [f"one={found.folder / 'new.yaml'}", f"two={found.folder / 'new.yaml'}"]
    assert main(words) == 2 and "compare two models" in capsys.readouterr().err


PIECES = ["<think>", "<response>", "</response>", "plan", "answer", " ", "\n", "\u2028", "{response_a}", "{prompt}"]
QUESTION = JudgeQuestion(TEMPLATE, 64, 0.0)
RUBRIC = Rubric(Endpoint("http://127.0.0.1:1/v1", "judge"), "rubric", 64)


@given(
    st.sampled_from(["think", "zero_think"]),
    st.lists(st.sampled_from([*PIECES, SECRET]), max_size=6).map("".join),
    st.booleans(),
    st.lists(st.sampled_from([*PIECES, "</think>"]), max_size=6).map("".join),
)
def test_no_completion_takes_a_thought_to_the_judge(name: FormatName, before: str, closed: bool, after: str) -> None:
    split = ThinkingFormat(name).split(before + SECRET + ("</think>" if closed else "") + after)
    other = ThinkingFormat("think").split(f"<think>{SECRET}</think>fine")
    prompt = Prompt(0, [Message(role="user", content="Hi")], {"rubric": ["is kind"]})
    questions = [
        each for pair in (Pair(prompt, split, other), Pair(prompt, other, split)) for each in QUESTION.ask(pair)
    ]
    questions += [RUBRIC.ask(prompt, each.response) for each in (split, other) if each.ok]
    assert not any(SECRET in turn["content"] for question in questions for turn in question.messages)


def test_intervals_of_judged_win_rates_cover_the_true_rate() -> None:
    generator = np.random.default_rng(0)
    rates = np.array([0.55, 0.15, 0.3])  # A in both orders, a tie or a contradiction, B in both orders
    truth, covered = rates[0] + rates[1] / 2, 0
    outcomes = [("a", "b"), ("a", "a"), ("b", "a")]
    for seed in range(200):
        verdicts = Verdicts([outcomes[i] for i in generator.choice(3, size=80, p=rates)])  # type: ignore[misc]
        found = bootstrap_mean(verdicts.points, seed=seed)
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / 200 <= 0.98
