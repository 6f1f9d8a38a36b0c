"""Calls, tokens and cost before a teacher is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlmt.distill.rows import Question
from rlmt.endpoints import Ledger, Meter, Usage
from rlmt.types import Prompt

CHARS_PER_TOKEN = 4
ASSUMED_ANSWER_TOKENS = 1200
"""Tokens of an answer while the ledger has none."""


@dataclass(frozen=True)
class Estimate:
    """What the remaining prompts take."""

    calls: int
    """Prompts to ask: calls if every first answer is accepted."""
    usage: Usage
    """Expected tokens, one answer per prompt."""
    most: Usage
    """Tokens if every prompt takes all tries and every answer has the maximum length."""
    answer_tokens: int
    """Expected tokens of an answer."""
    measured: int
    """Answers that `answer_tokens` is the mean of; 0 if it is assumed."""

    def sentences(self, meter: Meter) -> str:
        """The estimate in words, with prices of the meter."""
        source = f"the mean of {self.measured:,} answers" if self.measured else "assumed; --limit 20 measures it"
        text = (
            f"{self.calls:,} prompts to ask: about {self.usage.prompt_tokens:,} prompt tokens and "
            f"{self.usage.completion_tokens:,} completion tokens ({self.answer_tokens:,} an answer, {source})"
        )
        cost, most, spent = meter.price(self.usage), meter.price(self.most), meter.cost
        if cost is None or most is None or spent is None:
            return f"{text}. The prices are not set, so the cost is unknown."
        if not most:  # no prices are charged for a folder
            return f"{text}."
        return f"{text}, about US$ {cost:.2f}, at most US$ {most:.2f}; spent so far: US$ {spent:.2f}."


def estimate(question: Question, prompts: Sequence[Prompt], ledger: Ledger) -> Estimate:
    """Estimates tokens from the length of the prompts and the answers recorded so far.

    Args:
        question: How the teacher is asked.
        prompts: Prompts that are not done.
        ledger: Answers so far.
    """
    chars = sum(len(turn["content"]) for prompt in prompts for turn in question.messages(prompt))
    measured = len(ledger)
    recorded = ledger.usage[question.endpoint.model].completion_tokens
    answer_tokens = min(round(recorded / measured) if recorded else ASSUMED_ANSWER_TOKENS, question.max_tokens)
    prompt_tokens = chars // CHARS_PER_TOKEN
    return Estimate(
        calls=len(prompts),
        usage=Usage(prompt_tokens, len(prompts) * answer_tokens),
        most=Usage(prompt_tokens * question.tries, len(prompts) * question.tries * question.max_tokens),
        answer_tokens=answer_tokens,
        measured=measured if recorded else 0,
    )
