"""The endpoint that answers by rule: forms that distillation and every judged benchmark of the tiny files accept."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from rlmt.demos.endpoint import answer, make_server
from rlmt.demos.tiny_benchmarks import write_benchmarks
from rlmt.distill.rows import check_answer
from rlmt.evaluation.benchmark import Question
from rlmt.evaluation.benchmarks import BENCHMARKS
from rlmt.evaluation.compare.pairs import Pair
from rlmt.evaluation.table import PAPER_TABLE
from rlmt.evaluation.traits.questions import (
    Trait,
    compare_question,
    describe_question,
    judge_question,
    read_list,
    read_traits,
    read_winner,
    summary_question,
)
from rlmt.types import Prompt, Split, Status


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("benchmarks")
    assert set(write_benchmarks(out)) == set(BENCHMARKS) - {"ifeval", "math_500", "zebra_logic"}
    return out


@pytest.mark.parametrize("name", PAPER_TABLE)
def test_tiny_items_are_read_and_verdicts_are_parsed(name: str, benchmarks: Path) -> None:
    benchmark = BENCHMARKS[name]("ours")
    (path,) = benchmarks.glob(f"{name}*")
    items = benchmark.load(str(path))
    benchmark.check(items)
    assert len(items) in (3, 4)
    for item in items:
        questions = benchmark.questions(item, "It is good.") if benchmark.judge else []
        assert bool(questions) == (benchmark.judge is not None)
        answers = [answer([dict(message) for message in question.messages]) for question in questions]  # type: ignore[misc]
        assert benchmark.score(item, "It is good.", answers).parsed


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = make_server(0)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
    server.shutdown()
    server.server_close()


def ask(url: str, text: str) -> dict[str, Any]:
    body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": text}]}).encode()
    with urlopen(Request(url, body, {"Content-Type": "application/json"})) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


def test_teacher_writes_demonstrations_that_are_accepted(url: str) -> None:
    question = "Tell me about bees. Plan between <think> and </think>."
    attempt = check_answer(ask(url, question))
    assert not attempt.reason and attempt.thought and attempt.response
    assert ask(url, question) == ask(url, question) != ask(url, question.replace("bees", "bread"))


def test_lists_of_traits_and_verdicts_on_them_are_read() -> None:
    def reply(question: Question) -> str:
        return answer([dict(message) for message in question.messages])  # type: ignore[misc]

    prompts = [Prompt(number, [{"role": "user", "content": f"Hi {number}"}]) for number in range(20)]
    assert read_list(reply(describe_question(prompts[0], "a thought", 99)), 3, 8)
    assert read_list(reply(compare_question(["one"], ["another"], 1, 99)), 1, 8)
    assert read_traits(reply(summary_question(["one", "another"], 1, 12, 99)), 12)
    trait, splits = Trait("Plans", "It plans."), [Split(name, "fine", Status.OK) for name in ("one", "another")]
    pairs = [Pair(prompt, *splits) for prompt in prompts]
    winners = [read_winner(reply(judge_question(pair, trait, 0, 99)), pair, trait, 0) for pair in pairs]
    assert set(winners) == {"a", "b", "tie"}
