"""Benchmarks that a judge scores: questions, verdicts, and what `ours` mends of `authors`."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from rlmt.errors import UserError
from rlmt.evaluation.benchmark import Benchmark, Item, Row, Score, Scoring
from rlmt.evaluation.benchmarks import BENCHMARKS
from rlmt.evaluation.benchmarks.common import response_is_a
from rlmt.evaluation.completions import Completion
from rlmt.evaluation.length_control import authors_win_rate, length_controlled_win_rate
from rlmt.evaluation.scoring import score_completions
from rlmt.types import Status

Data = Callable[[str], str]
FULL = (
    "[Analysis]\nPace: 3 of 5.\n[Scores]\nCoherent: 20\nelegant prose: [20]\n- Nuanced Characters: 20\nWeak Dialogue: 0"
)


def verdict(choice: str) -> str:
    return json.dumps({"analysis of A": "x", "choice": choice})


def ranks(*models: tuple[str, int]) -> str:
    return json.dumps({"output": [{"model": model, "rank": rank} for model, rank in models]})


def placed(benchmark: Benchmark, item: Item, won: bool) -> str:
    """The letter of the response if it won, of the reference otherwise."""
    return "A" if won == response_is_a(benchmark, item) else "B"


def load(name: str, data: Data, scoring: Scoring = "ours") -> tuple[Benchmark, list[Item]]:
    benchmark = BENCHMARKS[name](scoring)
    return benchmark, benchmark.load(data(name))


@pytest.mark.parametrize("scoring", ["ours", "authors"])
@pytest.mark.parametrize(
    ("won", "suffix", "value"),
    [(True, "++", 100), (True, "+", 50), (None, "", 0), (False, "+", -50), (False, "++", -100)],
)
def test_wildbench_verdicts(won: bool | None, suffix: str, value: float, scoring: Scoring, data: Data) -> None:
    benchmark, (item,) = load("wildbench", data, scoring)
    choice = "A=B" if won is None else placed(benchmark, item, won) + suffix
    assert benchmark.score(item, "The Rhine", [verdict(choice)]) == Score(value)


@pytest.mark.parametrize(("written", "parsed"), [("a++", True), (" A ++ ", True), ("A", False), ("", False)])
def test_wildbench_verdict_in_another_spelling(written: str, parsed: bool, data: Data) -> None:
    benchmark, (item,) = load("wildbench", data)
    value = (100 if response_is_a(benchmark, item) else -100) if parsed else -100
    assert benchmark.score(item, "The Rhine", [verdict(written)]) == Score(value, parsed=parsed)
    authors, _ = load("wildbench", data, "authors")
    assert authors.score(item, "The Rhine", [verdict(written)]) == Score(-100, parsed=False)


def test_wildbench_question_holds_each_text_once_and_cuts_it(data: Data) -> None:
    benchmark, (item,) = load("wildbench", data)
    item.messages[-1]["content"] = "why " * 2100
    (ours,) = benchmark.questions(item, "The Rhine, {checklist}. " + "word " * 3000)
    text = ours.messages[0]["content"]
    assert ours.max_tokens == 1024 and ours.temperature == 0
    assert "USER: Hi {query}\n\nASSISTANT: Hello!" in text and "- Is it a river?\n- Is it short?" in text
    assert text.count("The Rhine, {checklist}.") == text.count("The Nile {response_b}") == 1
    assert text.count("word ") == 2000 - 3 - 1 and text.count("... (truncated)") == 2 and text.count("why ") < 2001
    assert text.index("<response_a>") < text.index("The Rhine" if response_is_a(benchmark, item) else "The Nile")
    authors, _ = load("wildbench", data, "authors")
    assert authors.questions(item, "x")[0].messages[0]["content"].count("why ") == 2100


def test_order_is_a_fair_coin_that_falls_the_same_way(data: Data) -> None:
    benchmark = BENCHMARKS["wildbench"]()
    first = [response_is_a(benchmark, Item(str(n), [])) for n in range(1000)]
    assert first == [response_is_a(benchmark, Item(str(n), [])) for n in range(1000)] and 450 < sum(first) < 550


@pytest.mark.parametrize("scoring", ["ours", "authors"])
@pytest.mark.parametrize("won", [True, False])
def test_alpaca_eval_verdicts(won: bool, scoring: Scoring, data: Data) -> None:
    benchmark, (item, *_) = load("alpaca_eval", data, scoring)
    winner = placed(benchmark, item, won)
    for answer in (ranks(("A", 1 + (winner == "B")), ("B", 1 + (winner == "A"))), f"```\n{ranks((winner, 1))}\n```"):
        assert benchmark.score(item, "x", [answer]) == Score(100.0 * won)


def test_alpaca_eval_without_one_winner_is_unparsed(data: Data) -> None:
    for scoring in ("ours", "authors"):
        benchmark, (item, *_) = load("alpaca_eval", data, scoring)  # type: ignore[arg-type]
        for answer in ("", "A", '{"output": 1}', '{"output": [1]}', ranks(("A", 2), ("B", 2)), ranks(("C", 1))):
            assert benchmark.score(item, "x", [answer]) == Score(0.0, parsed=False)
    both = ranks(("A", 1), ("B", 1))
    assert BENCHMARKS["alpaca_eval"]("ours").score(item, "x", [both]) == Score(0.0, parsed=False)
    assert BENCHMARKS["alpaca_eval"]("authors").score(item, "x", [both]).parsed  # the first one wins


def alpaca_rows(items: list[Item]) -> list[Row]:
    wins = [1, 0, 1, 1, 0, 0, 1]
    rows = [
        Row(item, "w" * (9 * n + 4), Score(100.0 * win)) for n, (item, win) in enumerate(zip(items, wins, strict=False))
    ]
    return [*rows, Row(items[7], "", Score(0.0), malformed=True)]


def test_alpaca_eval_figures_of_ours(data: Data) -> None:
    benchmark, items = load("alpaca_eval", data)
    rows = alpaca_rows(items)
    formed = rows[:-1]
    controlled = length_controlled_win_rate(
        [row.score.value / 100 for row in formed],
        [len(row.response) - 5 * int(row.item.id) - 5 for row in formed],
        [int(row.item.id) / 10 - 0.4 for row in formed],
    )
    unparsed = Row(items[0], "a very long response " * 9, Score(0.0, parsed=False))
    figures = benchmark.compute([*rows, unparsed])
    assert list(figures) == list(benchmark.figures)
    assert figures["win_rate"] == pytest.approx(50.0)
    assert figures["length_controlled_win_rate"] == pytest.approx(100 * 7 / 8 * controlled)
    assert benchmark.compute(rows[-1:])["length_controlled_win_rate"] == 0
    assert all(math.isnan(value) for value in benchmark.compute([unparsed]).values())


def test_alpaca_eval_figures_of_authors(data: Data) -> None:
    benchmark, items = load("alpaca_eval", data, "authors")
    rows = [*alpaca_rows(items), Row(items[0], "", Score(0.0, parsed=False))]
    words = [len(row.response.split()) - int(row.item.id) - 1 for row in rows]
    figures = benchmark.compute(rows)
    assert figures["win_rate"] == pytest.approx(100 * 4 / 9)
    expected = authors_win_rate([row.score.value / 100 for row in rows], words)
    assert figures["length_controlled_win_rate"] == pytest.approx(100 * expected)


def test_alpaca_eval_items_without_difficulty_can_be_scored_by_authors_only(data: Data) -> None:
    folder = data("alpaca_eval")
    assert load("alpaca_eval", lambda name: folder, "authors")[1] == load("alpaca_eval", lambda name: folder)[1]
    Path(folder, "instruction_difficulty.csv").unlink()
    authors, items = load("alpaca_eval", lambda name: folder, "authors")
    assert {item.data["difficulty"] for item in items} == {None}
    authors.check(items)
    for absent in (items, [replace(item, data=item.data | {"difficulty": 0.0}) for item in items]):
        with pytest.raises(UserError, match=r"no difficulty; run --generate_only --scoring ours with --data.alpaca_ev"):
            BENCHMARKS["alpaca_eval"]().check(absent)


ARENA = [  # response as A, response as B; value and weight under ours; value under authors
    ("A>>B", "B>>A", 100, 3, 100),
    ("A>B", "B>A", 100, 1, 100),
    ("A=B", "A=B", 50, 1, 50),
    ("B>A", "A>B", 0, 1, 0),
    ("A>>B", "A>B", 75, 2, 50),
    ("A>B", "A=B", 75, 1, 75),
]


@pytest.mark.parametrize(("first", "second", "value", "weight", "authors"), ARENA)
def test_arena_hard_verdicts(first: str, second: str, value: float, weight: float, authors: float, data: Data) -> None:
    answers = [f"I first saw [[B>>A]]. My verdict: [[{first}]]", f"Verdict: [{second.lower()}]"]
    benchmark, (item, _) = load("arena_hard", data)
    assert benchmark.score(item, "x", answers) == Score(value, weight=weight)
    assert BENCHMARKS["arena_hard"]("authors").score(item, "x", answers) == Score(authors)


@pytest.mark.parametrize(("scoring", "expected"), [("ours", 35.0), ("authors", 35.0)])
def test_arena_hard_malformed_output_weighs_like_a_clear_loss(
    scoring: Scoring, expected: float, tmp_path: Path
) -> None:
    """Three of ten are malformed, the others half won, half lost: 35 is the rate of the losses they count as."""
    benchmark, item = BENCHMARKS["arena_hard"](scoring), Item("u", [], {"reference": "a"})
    broken = [Completion("u", "", "", Status.UNCLOSED, "stop", 0, 1)] * 3
    malformed = score_completions(benchmark, [item] * 3, broken, None, tmp_path / "l.jsonl", show=False).rows
    clear = [benchmark.score(item, "x", answers) for answers in (["[[A>>B]]", "[[B>>A]]"], ["[[B>>A]]", "[[A>>B]]"])]
    formed = [Row(item, "x", score) for score in clear for _ in range(7)]
    assert benchmark.mean([*malformed, *malformed, *formed]) == pytest.approx(expected)


def test_arena_hard_missing_verdict_is_left_out_or_a_tie(data: Data) -> None:
    benchmark, (item, _) = load("arena_hard", data)
    answers = ["[[A>B]]", "I cannot decide: [[A>C]]"]
    assert benchmark.score(item, "x", answers) == Score(0, parsed=False)
    assert BENCHMARKS["arena_hard"]("authors").score(item, "x", answers) == Score(75, parsed=False)


def test_arena_hard_asks_in_both_orders(data: Data) -> None:
    benchmark, items = load("arena_hard", data)
    assert [item.id for item in items] == ["u1", "u2"]
    first, second = (question.messages for question in benchmark.questions(items[0], "mine {prompt}"))
    assert first[0]["role"] == "system" and "Sort {answer_a}.\u2028Now." in first[1]["content"]
    assert first[1]["content"].index("mine {prompt}") < first[1]["content"].index("sorted(x)")
    assert second[1]["content"].index("mine {prompt}") > second[1]["content"].index("sorted(x)")


def test_arena_hard_style_controlled_win_rate_is_that_of_equal_styles(data: Data) -> None:
    benchmark, items = load("arena_hard", data)
    random = np.random.default_rng(0)
    rows = []
    for _ in range(400):
        longer = random.random() < 0.5  # long responses win 90 of 100, short ones 40
        value = 100.0 * (random.random() < (0.9 if longer else 0.4))
        rows.append(Row(items[1], "w " * (9 if longer else 1), Score(value, weight=random.choice([1.0, 3.0]))))
    rows.append(Row(items[0], "", Score(0.0), malformed=True))
    figures = benchmark.compute(rows)
    weights, wins = np.array([[row.score.weight, row.score.value / 100] for row in rows[:-1]]).T
    relative = np.array([(len(row.response.split()) - 1) / (len(row.response.split()) + 1) for row in rows[:-1]])
    # the reference, **2**, has one bold text in one word: a style that always differs in the same way has no column
    columns = np.column_stack([np.ones(400), relative / relative.std(ddof=1)])

    def loss(c: np.ndarray) -> float:
        logits = columns @ c
        return float(weights @ (np.logaddexp(0, logits) - wins * logits) + 1e-6 * c[0] ** 2 / 2 + c[1] ** 2 / 2)

    expected = 1 / (1 + math.exp(-minimize(loss, np.zeros(2), tol=1e-12).x[0]))
    share = weights.sum() / (weights.sum() + 1)
    assert figures["style_controlled_win_rate"] == pytest.approx(100 * share * expected, abs=1e-3)
    assert figures["win_rate"] == pytest.approx(100 * weights @ wins / (weights.sum() + 1))
    assert figures["win_rate"] > figures["style_controlled_win_rate"] + 5


def test_creative_writing_scores(data: Data) -> None:
    benchmark, (item, *_) = load("creative_writing", data)
    assert benchmark.score(item, "x", [FULL]) == Score(100.0)
    worst = FULL.replace("20", "0").replace("Weak Dialogue: 0", "Weak Dialogue: 20")
    assert benchmark.score(item, "x", [worst]) == Score(0.0)
    mixed = "[Scores]\nCoherent: 12\nElegant Prose: 8.5\nWeak Dialogue: 3\nNuanced Characters: 25"
    assert benchmark.score(item, "x", [mixed]) == Score(pytest.approx(5 * (12 + 8.5 + 17) / 3))
    for unread in ("", FULL.replace("[Scores]", ""), "[Scores]\nCoherent: 12"):
        assert benchmark.score(item, "x", [unread]) == Score(0.0, parsed=False)


def test_creative_writing_of_authors_counts_any_number(data: Data) -> None:
    benchmark, (item, *_) = load("creative_writing", data, "authors")
    # Pace counts, the bullet keeps a name from being a criterion, and the score after [ is read by the second pattern
    assert benchmark.score(item, "x", [FULL]) == Score(pytest.approx(5 * (3 + 20 + 20 + 20 + 20) / 5))
    assert benchmark.score(item, "x", ["- Weak Dialogue: 20"]) == Score(100.0)  # ours inverts it
    assert benchmark.score(item, "x", ["no number"]) == Score(0.0, parsed=False)


def test_creative_writing_shows_the_judge_what_the_policy_saw(data: Data) -> None:
    benchmark, items = load("creative_writing", data)
    assert [(item.id, item.group) for item in items][:4] == [("1_1", "1"), ("1_2", "1"), ("1_3", "1"), ("7_1", "7")]
    assert [item.messages[0]["content"] for item in items[:3]] == [
        f"A fight. {seed} Past tense." for seed in ("At night.", "At sea.", "At night.")
    ]
    (ours,) = benchmark.questions(items[1], "word " * 3201 + "{negative}")
    text = ours.messages[0]["content"]
    assert "A fight. At sea. Past tense." in text and "lower is better: Weak Dialogue\n" in text
    assert text.count("word ") == 3199 and "{negative}" not in text and ours.max_tokens == 2048
    (theirs,) = BENCHMARKS["creative_writing"]("authors").questions(items[1], "x")
    assert "A fight. <SEED> Past tense." in theirs.messages[0]["content"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_registry_and_failure_values(name: str, data: Data) -> None:
    benchmark, items = load(name, data)
    assert benchmark.name == name and benchmark.title and benchmark.source
    assert benchmark.failure == (-100 if name == "wildbench" else 0)
    assert (benchmark.judge is not None) == bool(benchmark.questions(items[0], "x"))
    rows = [Row(item, "", Score(benchmark.failure), malformed=True) for item in items]
    assert set(benchmark.compute(rows).values()) == {benchmark.failure} and list(benchmark.compute(rows)) == [
        *benchmark.figures
    ]


def test_documentation_lists_every_benchmark() -> None:
    page = Path(__file__).parents[3] / "docs" / "reference" / "benchmarks.md"
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    for name, benchmark in BENCHMARKS.items():
        described, rules, *_ = [row for row in rows if row.startswith(f"| `{name}` |")]
        assert (
            f" {benchmark.title}" in described and f"| {benchmark.failure:g} |" in described and rules.count(" | ") >= 1
        )
        assert (benchmark.judge or "–") in described and (benchmark.baseline or "") in described


def test_chat_average_is_that_of_the_paper() -> None:
    assert [name for name, benchmark in BENCHMARKS.items() if benchmark.chat] == [
        "wildbench",
        "alpaca_eval",
        "arena_hard",
    ]


ERRORS = [
    ("popqa", "popqa.json", '[{"id": 1, "question": "a"}]', "popqa.json has no column 'possible_answers', only 'id', "),
    ("popqa", "popqa.json", '[{"id": 1, "question": "a", "possible_answers": "x"}]', "`possible_answers` is text"),
    ("mmlu_redux", "mmlu_redux.json", '[{"question": "a", "choices": ["a"], "answer": 0, "error_type": "ok", '
     '"correct_answer": null}]', "row 1: `choices` has 1 entries, not 4"),
    ("zebra_logic", "zebra_logic.jsonl", '{"id": 1, "puzzle": "a", "solution": {"rows": []}}', "has no `header` that"),
    ("ifeval", "ifeval.json", '[{"key": 1, "prompt": "a", "instruction_id_list": ["a"], "kwargs": []}]', "1 entries"),
    ("wildbench", "wildbench.json", '[{"conversation_input": [{"role": "user", "content": "a"}], "checklist": [], '
     '"references": {"claude": "b"}}]', "row 1: the reference of gpt-4 is missing"),
    ("arena_hard", "model_answer/o3-mini-2025-01-31.jsonl", '{"uid": "u1", "messages": [{"content": {"answer": "b"}}]}',
     "has no answer to 1 prompts, such as u2; download it again"),
    ("creative_writing", "negative_criteria.txt", "Dull", "'Dull' is not in creative_writing_crit"),
    ("creative_writing", "creative_writing_prompts_v3.json", "[]", "is not an object of prompts"),
    ("alpaca_eval", "instruction_difficulty.csv", ",0\n0,1.5\n", "has no number for each of 8 instructions"),
    ("math_500", "math_500.json", json.dumps([{"problem": "a", "answer": "1", "unique_id": "x"}] * 2), "'x' occurs 2"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "text", "message"), ERRORS)
def test_wrong_data_are_an_error_in_one_line(name: str, file: str, text: str, message: str, data: Data) -> None:
    path = data(name)
    folder = path.removesuffix(f"/{file}")
    with open(f"{folder}/{file}", "w", encoding="utf-8") as stream:
        stream.write(text)
    with pytest.raises(UserError, match=r"^\S+.*\.$") as error:
        BENCHMARKS[name]().load(path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["arena_hard", "alpaca_eval", "creative_writing"])
def test_folder_without_a_file_is_an_error_with_the_source(name: str, tmp_path: object) -> None:
    with pytest.raises(UserError, match="has no file .*; download the data of .* from https://"):
        BENCHMARKS[name]().load(str(tmp_path))


def test_page_is_not_a_file() -> None:
    with pytest.raises(UserError, match="^https://.* is a page, not a file; download the data of MMLU-Redux"):
        BENCHMARKS["mmlu_redux"]().load(BENCHMARKS["mmlu_redux"].source)
