"""Asks an endpoint many questions: an estimate first, answers from the ledger where it has them, a progress bar."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rlmt.endpoints import CONTINUE, Call, Endpoint, EndpointClient, Ledger, RequestRejected, Usage
from rlmt.endpoints.estimate import confirm, estimate
from rlmt.endpoints.progress import RequestProgress, track_requests
from rlmt.errors import UserError

MAX_FIRST_REFUSALS = 10
"""Refused requests after which nothing more is sent if there was no answer: a wrong field in the body refuses all."""

Answers = list[dict[str, Any] | None]
"""JSON of the answer to each call of a case; None where the endpoint refuses the call."""
Accept = Callable[[int, Answers], bool]
"""Called with the number of a case and its answers; whether they can be used."""


@dataclass(frozen=True)
class Asking:
    """How an endpoint is asked.

    Args:
        endpoint: The endpoint.
        option: Option or file of the endpoint, for messages.
        label: Label of the progress bar.
        what: Plural noun for the calls.
        attempts: How often a case is asked until its answers are accepted.
        yes: Start without a question about the cost.
        show: Print the estimate, and show a progress bar.
        fix: What the user can do when the endpoint is lost; the end of the message.
    """

    endpoint: Endpoint
    option: str
    label: str
    what: str
    attempts: int = 1
    yes: bool = False
    show: bool = True
    fix: str = CONTINUE

    def ask(
        self,
        cases: Sequence[Sequence[Call]],
        ledger: Ledger,
        accept: Accept | None = None,
        spent: Usage = Usage(),  # noqa: B008 - immutable
    ) -> list[Answers]:
        """Asks the calls of all cases that the ledger has no answers to.

        Args:
            cases: Calls that are asked together, and asked again together.
            ledger: Answers so far; every answer is recorded as it arrives.
            accept: Whether the answers to a case can be used; None uses all.
            spent: Billed tokens outside the ledger that count towards the cost limit.

        Returns:
            The last answers to each case.

        Raises:
            UserError: The endpoint fails, refuses all requests (beside recorded answers: more than there are of them)
                or reaches its cost limit, or the user declines.
        """
        client = EndpointClient(self.endpoint, ledger, self.fix, spent)
        calls = [call for case in cases for call in case]
        open_calls = [call for call in calls if call.key not in ledger]
        if open_calls:
            self.endpoint.check(self.option)
            if self.show:
                print(estimate(open_calls, ledger, self.what, self.attempts).sentences(client.meter), flush=True)
            if not self.yes:
                confirm()
        asked = _Asked(self, client, accept or (lambda i, answers: True), len(calls) - len(open_calls))
        answers = asyncio.run(asked.ask_all(cases))
        asked.report_refusals(len(calls))
        return answers


@dataclass
class _Asked:
    """One start of the questions."""

    asking: Asking
    client: EndpointClient
    accept: Accept
    recorded: int
    """Calls that the ledger has answers to."""
    refusals: list[RequestRejected] = field(default_factory=list)

    async def ask_all(self, cases: Sequence[Sequence[Call]]) -> list[Answers]:
        """Asks all cases; the first error stops the rest."""
        if not self.asking.show:
            return await self._gather(cases, None)
        with track_requests(self.asking.label, len(cases), self.client.meter) as bar:
            return await self._gather(cases, bar)

    def report_refusals(self, calls: int) -> None:
        """Prints how many of the calls were refused.

        Raises:
            UserError: All requests were, and they are more than the recorded answers.
        """
        if not self.refusals:
            return
        self._check_refusals(f"all {len(self.refusals):,} requests were refused")
        counts = f"{len(self.refusals):,} of {calls:,} {self.asking.what}"
        print(f"{self.asking.option}: {counts} were refused and have no answer: {self.refusals[0]}", file=sys.stderr)

    def _check_refusals(self, what: str) -> None:
        """Raises UserError if refusals are no matter of single calls: a wrong field in the body refuses all."""
        if not self.client.meter.answers and len(self.refusals) > self.recorded:
            raise UserError(f"{self.asking.option}: {what}: {self.refusals[0]}") from self.refusals[0]

    async def _gather(self, cases: Sequence[Sequence[Call]], bar: RequestProgress | None) -> list[Answers]:
        try:
            async with self.client, asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._ask_case(case, partial(self.accept, i), bar))
                    for i, case in enumerate(cases)
                ]
        except BaseExceptionGroup as errors:
            if errors.subgroup(lambda error: not isinstance(error, UserError | BaseExceptionGroup)) is not None:
                raise
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask_case(
        self, case: Sequence[Call], accept: Callable[[Answers], bool], bar: RequestProgress | None
    ) -> Answers:
        """Asks until the answers are accepted or the attempts are used up."""
        answers: Answers = []
        for attempt in range(self.asking.attempts):
            answers = list(await asyncio.gather(*(self._post(call.repeat(attempt)) for call in case)))
            if None in answers or accept(answers):
                break
        if bar is not None:
            bar.advance()
        return answers

    async def _post(self, call: Call) -> dict[str, Any] | None:
        """The answer to a call; None if it is refused."""
        try:
            return await self.client.post(call)
        except RequestRejected as error:
            self.refusals.append(error)
            if len(self.refusals) >= MAX_FIRST_REFUSALS:
                self._check_refusals(f"the first {len(self.refusals):,} requests were refused, so no more are sent")
            return None
