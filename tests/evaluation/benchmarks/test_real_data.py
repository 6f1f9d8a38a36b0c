"""The benchmarks on their real files, in the folder that RLMT_EVAL_DATA names.

It has the files of each benchmark in a folder of its own, or, flat, alpaca_eval_gpt4_baseline.json, ifbench.json,
ifeval.json, math_500.json, mmlu_redux.json, zebra_logic.jsonl, creative_writing_*, arena_hard_v2_* and alpaca_lc_*.csv.
"""

import csv
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from rlmt.evaluation.benchmark import Scoring
from rlmt.evaluation.benchmarks import BENCHMARKS, math_500
from rlmt.evaluation.length_control import authors_win_rate, length_controlled_win_rate

pytestmark = pytest.mark.skipif("RLMT_EVAL_DATA" not in os.environ, reason="RLMT_EVAL_DATA names no folder of data")
FOLDER = Path(os.environ.get("RLMT_EVAL_DATA", ""))
NAMES = {
    "alpaca_eval_gpt4_baseline.json": "alpaca_eval_gpt4_baseline.json",
    "alpaca_instruction_difficulty.csv": "instruction_difficulty.csv",
    "arena_hard_v2_question.jsonl": "question.jsonl",
    "arena_hard_v2_o3_mini.jsonl": "model_answer/o3-mini-2025-01-31.jsonl",
    "creative_writing_prompts_v3.json": "creative_writing_prompts_v3.json",
    "creative_writing_criteria.txt": "creative_writing_criteria.txt",
    "creative_writing_negative_criteria.txt": "negative_criteria.txt",
}


def rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("name", "count"), [("alpaca_eval", 805), ("arena_hard", 500), ("creative_writing", 96)])
def test_files_of_a_folder_load(name: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "model_answer").mkdir()
    for old, new in NAMES.items():
        shutil.copy(FOLDER / old, tmp_path / new)
    benchmark = BENCHMARKS[name]()
    items = benchmark.load(str(tmp_path))
    assert len(items) == count and all(benchmark.questions(item, "x") for item in items)


def test_mmlu_redux_has_5376_usable_rows_with_full_and_zero_scores() -> None:
    for scoring in ("ours", "authors"):
        benchmark = BENCHMARKS["mmlu_redux"](scoring)  # type: ignore[arg-type]
        items = benchmark.load(str(FOLDER / "mmlu_redux.json"))
        assert len(items) == 5376
        for item in items:
            wrong = "ABCD"[("ABCD".index(item.data["answer"]) + 1) % 4]
            assert benchmark.score(item, f"Answer: {item.data['answer']}", []).value == 100
            assert benchmark.score(item, f"Answer: {wrong}", []).value == 0


def test_zebra_logic_gold_is_full_on_all_rows() -> None:
    benchmark = BENCHMARKS["zebra_logic"]()
    items = benchmark.load(str(FOLDER / "zebra_logic.jsonl"))
    answers = [json.dumps({"solution": item.data["solution"]}) for item in items]
    gold = [benchmark.score(item, answer, []).value for item, answer in zip(items, answers, strict=True)]
    for item in items:
        item.data["solution"]["House 2"]["Name"] += "x"
    changed = [benchmark.score(item, answer, []).value for item, answer in zip(items, answers, strict=True)]
    assert len(items) == 1000 and set(gold) == {100.0} and set(changed) == {0.0}


@pytest.mark.parametrize("scoring", ["ours", "authors"])
def test_math_500_solutions_are_full_on_all_rows(scoring: Scoring, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = BENCHMARKS["math_500"](scoring)
    solutions = [row["solution"] for row in json.loads((FOLDER / "math_500.json").read_text(encoding="utf-8"))]
    items = benchmark.load(str(FOLDER / "math_500.json"))
    scores = [benchmark.score(item, solution, []).value for item, solution in zip(items, solutions, strict=True)]
    assert len(scores) == 500 and set(scores) == {100.0}
    if scoring == "ours":  # by math-verify alone
        monkeypatch.setattr(math_500, "equal_text", lambda gold, answer: False)
        assert {benchmark.score(item, f"\\boxed{{{item.data['answer']}}}", []).value for item in items} == {100.0}
    assert all(benchmark.score(item, "\\boxed{\\text{none of it}}", []).value == 0 for item in items[:100])


@pytest.mark.parametrize(("name", "count", "checks"), [("ifeval", 541, 834), ("ifbench", 294, 335)])
def test_instructions_of_all_rows_are_checked(
    name: str, count: int, checks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nltk.download", lambda *names, **options: False)
    benchmark: Any = BENCHMARKS[name]()
    items = benchmark.load(str(FOLDER / f"{name}.json"))
    done, missing = 0, 0
    for item in items:
        for checker in benchmark.checkers(item):
            try:
                assert benchmark.follows(checker, "") is False
                assert benchmark.follows(checker, "Some text, and more.\n\nThe end.") in (True, False)
                done += 1
            except LookupError:  # NLTK's data
                missing += 1
    assert len(items) == count and done + missing == checks
    if missing:
        pytest.skip(f"{missing} of {checks} checks need NLTK's data, {done} ran")


def test_length_control_is_within_one_point_of_the_official_values() -> None:
    difficulty = {int(row[""]): float(row["0"]) for row in rows("alpaca_instruction_difficulty.csv")}
    annotations = defaultdict(list)
    for row in rows("alpaca_lc_annotations.csv"):
        annotations[row["model"]].append(row)
    official, authors = [], []
    for row in rows("alpaca_lc_official.csv"):
        own = annotations[row["model"]]
        preferences = [min(max(float(one["preference"]) - 1, 0.0), 1.0) for one in own]
        characters = [float(one["chars_model"]) - float(one["chars_baseline"]) for one in own]
        words = [float(one["words_model"]) - float(one["words_baseline"]) for one in own]
        controlled = length_controlled_win_rate(preferences, characters, [difficulty[int(one["index"])] for one in own])
        official.append(abs(100 * controlled - float(row["length_controlled_win_rate"])))
        wins = [float(round(preference)) for preference in preferences]
        authors.append(abs(100 * authors_win_rate(wins, words) - float(row["authors_formula"])))
    assert sum(official) / len(official) < 1.0
    assert max(authors) < 0.01
