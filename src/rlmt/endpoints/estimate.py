"""Calls, tokens and cost before an endpoint is asked, and the question whether to start."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rlmt.endpoints.calls import Call, Usage
from rlmt.endpoints.ledger import Ledger
from rlmt.endpoints.meter import Meter, largest_usage
from rlmt.errors import UserError

CHARS_PER_TOKEN = 4
ASSUMED_ANSWER_TOKENS = 1200
"""Tokens of an answer while the ledger has none."""


@dataclass(frozen=True)
class Estimate:
    """What the remaining calls take."""

    calls: int
    """Calls if the first answer to each is accepted."""
    what: str
    """Plural noun for the calls."""
    usage: Usage
    """Expected tokens, one answer per call."""
    most: Usage
    """Tokens if every call takes all tries and every answer has the maximum length."""
    answer_tokens: int
    """Expected tokens of an answer."""
    measured: int
    """Answers that `answer_tokens` is the mean of; 0 if it is assumed."""

    def sentences(self, meter: Meter) -> str:
        """The estimate in words, with prices of the meter."""
        source = f"the mean of {self.measured:,} answers" if self.measured else "assumed; --limit 20 measures it"
        text = (
            f"{self.calls:,} {self.what} to ask: about {self.usage.prompt_tokens:,} prompt tokens and "
            f"{self.usage.completion_tokens:,} completion tokens ({self.answer_tokens:,} an answer, {source})"
        )
        cost, most, spent = meter.price(self.usage), meter.price(self.most), meter.cost
        if cost is None or most is None or spent is None:
            return f"{text}. The prices are not set, so the cost is unknown."
        if not most:  # no prices are charged for a folder
            return f"{text}."
        return f"{text}, about US$ {cost:.2f}, at most US$ {most:.2f}; spent so far: US$ {spent:.2f}."


def estimate(calls: Sequence[Call], ledger: Ledger, what: str, tries: int = 1) -> Estimate:
    """Estimates tokens from the length of the prompts and the answers of the same model recorded so far.

    Args:
        calls: Chat calls that are not answered, at least one.
        ledger: Answers so far.
        what: Plural noun for the calls.
        tries: Maximum number of answers per call.
    """
    model = str(calls[0].body.get("model", ""))
    recorded, measured = ledger.usage[model].completion_tokens, ledger.counts[model]
    mean = round(recorded / measured) if recorded else ASSUMED_ANSWER_TOKENS
    longest = [largest_usage(call).completion_tokens for call in calls]
    expected = sum(min(mean, most) for most in longest)
    prompt_tokens = sum(len(turn["content"]) for call in calls for turn in call.body["messages"]) // CHARS_PER_TOKEN
    return Estimate(
        calls=len(calls),
        what=what,
        usage=Usage(prompt_tokens, expected),
        most=Usage(prompt_tokens * tries, sum(longest) * tries),
        answer_tokens=round(expected / len(calls)),
        measured=measured if recorded else 0,
    )


def confirm() -> None:
    """Asks the user whether to start.

    Raises:
        UserError: There is no terminal to ask on, or the answer is no.
    """
    if not sys.stdin.isatty():
        raise UserError("--yes: there is no terminal to ask on; pass --yes to start without a question.")
    if input("Start? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("Nothing was asked; start with y, or pass --yes.")
