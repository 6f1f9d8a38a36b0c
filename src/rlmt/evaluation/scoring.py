"""Scores a model's completions of a benchmark: rules at once, judges through the ledger, malformed output never."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlmt.endpoints import CONTINUE, Endpoint
from rlmt.errors import UserError
from rlmt.evaluation.benchmark import Benchmark, Item, Row, Score
from rlmt.evaluation.completions import Completion
from rlmt.evaluation.judging import ATTEMPTS, ask_judge


@dataclass(frozen=True)
class Scored:
    """Scores of one model on one benchmark."""

    rows: list[Row]
    """One per item."""
    judge: str | None = None
    """Model that was asked; None if a rule scored."""
    judge_versions: tuple[str, ...] = ()
    """The judge as the endpoint reported it."""


def score_completions(
    benchmark: Benchmark,
    items: Sequence[Item],
    completions: Sequence[Completion],
    judge: Endpoint | None,
    ledger: Path,
    *,
    label: str = "judge",
    yes: bool = False,
    show: bool = True,
    option: str = "--judge",
    fix: str = CONTINUE,
) -> Scored:
    """Scores completions; the judge sees responses of well-formed ones, and no thought.

    Under `ours` an answer of the judge that cannot be read is asked for again, and one that was cut off counts as
    unreadable; under `authors` the first answer counts as it is.

    Args:
        benchmark: The benchmark.
        items: Its items.
        completions: One completion per item.
        judge: The judge; None if a rule scores.
        ledger: File of the judge's answers.
        label: Label of the progress bar.
        yes: Ask without a question about the cost.
        show: Print the estimate, and show a progress bar.
        option: Option of the judge, for messages.
        fix: What the user can do when the judge is lost; the end of the message.

    Raises:
        UserError: There is no judge although the benchmark asks, or as `ask_judge`.
    """
    pairs = list(zip(items, completions, strict=True))
    formed = [(item, completion.response) for item, completion in pairs if completion.ok]
    cases = [benchmark.questions(item, response) for item, response in formed]
    asked = [number for number, case in enumerate(cases) if case]
    answers: list[list[str]] = [[] for _ in cases]
    versions: tuple[str, ...] = ()
    if asked:
        if judge is None or not judge.model:
            raise UserError(
                f"{option}.model: {benchmark.title} asks a judge (in the paper {benchmark.judge}); set one."
            )
        authors = benchmark.scoring == "authors"
        verdicts = ask_judge(
            judge,
            [cases[number] for number in asked],
            ledger,
            lambda i, texts: benchmark.score(*formed[asked[i]], texts).parsed,
            label=label,
            attempts=1 if authors else ATTEMPTS,
            truncated=authors,
            yes=yes,
            show=show,
            option=option,
            fix=fix,
        )
        versions = verdicts.versions
        for number, texts in zip(asked, verdicts.answers, strict=True):
            answers[number] = texts
    scores = {
        item.id: benchmark.score(item, response, texts) for (item, response), texts in zip(formed, answers, strict=True)
    }
    failure = Score(benchmark.failure, weight=benchmark.failure_weight if benchmark.scoring == "ours" else 1.0)
    rows = [
        Row(item, completion.response, scores.get(item.id, failure), malformed=not completion.ok)
        for item, completion in pairs
    ]
    return Scored(rows, judge.model if asked and judge is not None else None, versions)
