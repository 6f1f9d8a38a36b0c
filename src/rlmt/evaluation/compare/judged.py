"""Asks the judge about pairs: which response is better, in both orders; with a rubric, which criteria each meets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from rlmt.checkpointing.files import atomic_write
from rlmt.endpoints import Endpoint
from rlmt.evaluation.benchmark import Question
from rlmt.evaluation.compare.judge import JudgeQuestion, Verdicts, collect, read_verdict
from rlmt.evaluation.compare.pairs import Pair
from rlmt.evaluation.compare.rubric import Rubric
from rlmt.evaluation.judging import ask_judge
from rlmt.evaluation.statistics import Floats


@dataclass(frozen=True)
class Judged:
    """What the judge said about the well-formed pairs."""

    verdicts: Verdicts
    """Its verdicts in both orders."""
    rubric: tuple[Floats, Floats] | None
    """[n] shares of the criteria that A's and B's responses meet; None without a rubric."""
    versions: tuple[str, ...]
    """Names and versions of the judge as the endpoint reports them."""


def ask_about_pairs(
    judge: Endpoint,
    question: JudgeQuestion,
    rubric: Rubric | None,
    pairs: Sequence[Pair],
    out: Path,
    attempts: int,
    yes: bool,
) -> Judged:
    """Asks what the ledger in `out` has no answers to, and writes verdicts.parquet.

    Args:
        judge: The judge.
        question: How it compares responses.
        rubric: How it checks criteria, if it does.
        pairs: n pairs.
        out: Output folder.
        attempts: How often a verdict that cannot be read is asked for.
        yes: Start without a question about the cost.

    Raises:
        UserError: The judge cannot be asked, a checklist is invalid, or none of many answers can be read.
    """
    comparisons = [(pair, each) for pair in pairs for each in question.ask(pair)]
    checks = [
        (pair, rubric.ask(pair.prompt, split.response))
        for pair in pairs
        if rubric is not None and pair.well_formed
        for split in (pair.first, pair.second)
    ]

    def readable(number: int, answers: list[str]) -> bool:
        if number < len(comparisons):
            return read_verdict(answers[0]) is not None
        return rubric is not None and rubric.readable(checks[number - len(comparisons)][0].prompt, answers[0])

    cases: list[list[Question]] = [[each] for _, each in [*comparisons, *checks]]
    found = ask_judge(judge, cases, out / "judge.jsonl", readable, attempts=attempts, yes=yes)
    texts = [answers[0] if answers else "" for answers in found.answers]
    verdicts = collect(pairs, [read_verdict(text) for text in texts[: len(comparisons)]], question)
    _write_verdicts(comparisons, texts, out / "verdicts.parquet")
    scores = None if rubric is None else _rubric_scores(rubric, pairs, texts[len(comparisons) :])
    return Judged(verdicts, scores, found.versions)


def judge_pairs(
    judge: Endpoint, question: JudgeQuestion, pairs: Sequence[Pair], ledger: Path, option: str, fix: str
) -> Verdicts:
    """The judge's verdicts on the well-formed pairs, asked without an estimate, a question or a progress bar.

    Args:
        judge: The judge.
        question: How it compares responses.
        pairs: n pairs.
        ledger: File of its answers.
        option: Option of the judge, for messages.
        fix: What the user can do when the judge is lost; the end of the message.

    Raises:
        UserError: The judge cannot be asked, or none of many answers can be read.
    """
    cases = [[each] for pair in pairs for each in question.ask(pair)]
    found = ask_judge(
        judge,
        cases,
        ledger,
        lambda number, answers: read_verdict(answers[0]) is not None,
        yes=True,
        show=False,
        option=option,
        fix=fix,
    )
    return collect(pairs, [read_verdict(answers[0]) for answers in found.answers], question)


def _rubric_scores(rubric: Rubric, pairs: Sequence[Pair], texts: Sequence[str]) -> tuple[Floats, Floats]:
    rows = np.full((len(pairs), 2), math.nan)
    answers = iter(texts)
    for row, pair in zip(rows, pairs, strict=True):
        if pair.well_formed:
            row[:] = rubric.score(pair.prompt, [next(answers), next(answers)])
    return rows[:, 0], rows[:, 1]


def _write_verdicts(comparisons: Sequence[tuple[Pair, Question]], texts: Sequence[str], path: Path) -> None:
    """Writes a row per question: row number of the prompt, the policy shown first, the preferred one, the answer."""
    rows = []
    for number, (pair, _) in enumerate(comparisons):
        shown = "ab"[number % 2]  # two questions a pair, A's response first in the first one
        verdict = read_verdict(texts[number])
        winner = {"a": shown, "b": "ba"[number % 2]}.get(verdict or "", verdict)
        rows.append({"prompt": pair.prompt.index, "first": shown, "winner": winner, "answer": texts[number]})
    fields = [("prompt", pyarrow.int64()), *((name, pyarrow.string()) for name in ("first", "winner", "answer"))]
    with atomic_write(path) as unfinished:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(fields)), unfinished)
