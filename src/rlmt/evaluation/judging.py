"""Asks a judge: every answer is kept in a ledger, so that none is paid for twice; unreadable ones are asked for again.

A judge of a benchmark or of a comparison sees prompts and responses. No caller but the trait analysis passes thoughts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlmt.endpoints import CONTINUE, ChatAnswer, Endpoint, Ledger, chat_call
from rlmt.errors import UserError
from rlmt.evaluation.asking import Answers, Asking
from rlmt.evaluation.benchmark import Question

MANY = 8
"""Number of cases from which on none that can be read is an error of the judge and no accident."""

ATTEMPTS = 3
"""How often a case is asked until its answers can be read."""


@dataclass(frozen=True)
class Verdicts:
    """A judge's answers."""

    answers: list[list[str]]
    """For each case the last answer to each of its questions; empty where the judge refused to answer."""
    versions: tuple[str, ...]
    """Names and versions of the judge as the endpoint reported them, sorted; several if it changed in between."""


def ask_judge(
    judge: Endpoint,
    cases: Sequence[Sequence[Question]],
    ledger: Path,
    readable: Callable[[int, list[str]], bool],
    *,
    label: str = "judge",
    attempts: int = ATTEMPTS,
    truncated: bool = False,
    yes: bool = False,
    show: bool = True,
    option: str = "--judge",
    fix: str = CONTINUE,
) -> Verdicts:
    """Asks the questions that the ledger has no answers to, and returns the answers to all.

    Args:
        judge: The judge.
        cases: Questions that are read together: a case whose answers cannot be read is asked again as a whole.
        ledger: File of the answers. While another process asks with it, this one waits, and then uses its answers.
        readable: Called with the number of a case and its answers; whether verdicts can be read in them.
        label: Label of the progress bar.
        attempts: How often a case is asked until its answers can be read.
        truncated: Whether an answer that was cut off at its maximum length is read; otherwise it counts as empty.
        yes: Start without a question about the cost.
        show: Print the estimate, and show a progress bar.
        option: Option of the judge, for messages.
        fix: What the user can do when the judge is lost; the end of the message.

    Raises:
        UserError: The judge cannot be asked, reaches its cost limit or refuses all questions, the user declines, or
            none of many answers can be read.
    """
    if not cases:
        return Verdicts([], ())
    calls = [
        [chat_call(judge, q.messages, temperature=q.temperature, max_tokens=q.max_tokens) for q in case]
        for case in cases
    ]
    asking = Asking(judge, option, label, "questions", attempts, yes, show, fix)
    opened = Ledger(ledger, wait=True)
    try:
        found = asking.ask(calls, opened, lambda i, answers: readable(i, _texts(answers, truncated, option)))
    finally:
        opened.close()
    texts = [_texts(answers, truncated, option) for answers in found]
    if len(cases) >= MANY and not any(readable(i, answers) for i, answers in enumerate(texts)):
        end = " ".join(texts[0][-1].split())[-80:]
        raise UserError(
            f"{option}: none of {len(cases):,} answers of {judge.model or judge.base_url} can be read, one ends with "
            f"{end!r}; use a stronger judge, or raise the length of its answers."
        )
    models = {answer.get("model") for answers in found for answer in answers if answer is not None}
    return Verdicts(texts, tuple(sorted(model for model in models if isinstance(model, str))))


def _texts(answers: Answers, truncated: bool, option: str) -> list[str]:
    """The text of each answer; empty if it was refused, or cut off and `truncated` is not set."""
    texts = []
    for answer in answers:
        if answer is None:
            texts.append("")
            continue
        try:
            message = ChatAnswer.from_json(answer)
        except ValueError as error:
            raise UserError(f"{option}: {error}; check base_url of the endpoint.") from error
        texts.append(message.text if truncated or message.finish in ("stop", "") else "")
    return texts
