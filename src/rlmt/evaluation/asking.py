"""Asks an endpoint many questions: an estimate first, answers from the ledger where it has them, a progress bar."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rlmt.endpoints import Call, Endpoint, EndpointClient, Ledger, RequestRejected
from rlmt.endpoints.estimate import confirm, estimate
from rlmt.endpoints.progress import RequestProgress, track_requests
from rlmt.errors import UserError

MAX_FIRST_REFUSALS = 10
"""Refused requests after which nothing more is sent if there was no answer: a wrong field in the body refuses all."""

CONTINUE = "run the same command again: it continues where it stopped"

RETRY_TEMPERATURE = 0.7
"""Lowest temperature of repeated questions: greedy decoding would give the same unreadable answer."""

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
    ) -> list[Answers]:
        """Asks the calls of all cases that the ledger has no answers to.

        Args:
            cases: Calls that are asked together, and asked again together.
            ledger: Answers so far; every answer is recorded as it arrives.
            accept: Whether the answers to a case can be used; None uses all.

        Returns:
            The last answers to each case.

        Raises:
            UserError: The endpoint fails, refuses all calls or reaches its cost limit, or the user declines.
        """
        client = EndpointClient(self.endpoint, ledger, self.fix)
        if open_calls := [call for case in cases for call in case if call.key not in ledger]:
            self.endpoint.check(self.option)
            if self.show:
                print(estimate(open_calls, ledger, self.what, self.attempts).sentences(client.meter), flush=True)
            if not self.yes:
                confirm()
        return asyncio.run(self._ask_all(client, cases, accept or (lambda i, answers: True)))

    async def _ask_all(self, client: EndpointClient, cases: Sequence[Sequence[Call]], accept: Accept) -> list[Answers]:
        """Asks all cases; the first error stops the rest."""
        if not self.show:
            return await self._gather(client, cases, accept, None)
        with track_requests(self.label, len(cases), client.meter) as bar:
            return await self._gather(client, cases, accept, bar)

    async def _gather(
        self,
        client: EndpointClient,
        cases: Sequence[Sequence[Call]],
        accept: Accept,
        bar: RequestProgress | None,
    ) -> list[Answers]:
        refusals: list[RequestRejected] = []
        try:
            async with client, asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._ask_case(client, case, partial(accept, i), refusals, bar))
                    for i, case in enumerate(cases)
                ]
        except BaseExceptionGroup as errors:
            if errors.subgroup(lambda error: not isinstance(error, UserError | BaseExceptionGroup)) is not None:
                raise
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask_case(
        self,
        client: EndpointClient,
        case: Sequence[Call],
        accept: Callable[[Answers], bool],
        refusals: list[RequestRejected],
        bar: RequestProgress | None,
    ) -> Answers:
        """Asks until the answers are accepted or the attempts are used up."""
        answers: Answers = []
        for attempt in range(self.attempts):
            answers = list(await asyncio.gather(*(self._post(client, _repeat(c, attempt), refusals) for c in case)))
            if None in answers or accept(answers):
                break
        if bar is not None:
            bar.advance()
        return answers

    async def _post(self, client: EndpointClient, call: Call, refusals: list[RequestRejected]) -> dict[str, Any] | None:
        """The answer to a call; None if it is refused."""
        try:
            return await client.post(call)
        except RequestRejected as error:
            refusals.append(error)
            if len(refusals) >= MAX_FIRST_REFUSALS and not client.meter.answers and not client.meter.reused:
                raise UserError(
                    f"{self.option}: the first {MAX_FIRST_REFUSALS} requests were refused, so no more are sent: {error}"
                ) from error
            return None


def _repeat(call: Call, attempt: int) -> Call:
    """The same question once more, as a call of its own; the question itself at attempt 0."""
    if attempt == 0:
        return call
    body = dict(call.body)
    if "temperature" in body:
        body["temperature"] = max(body["temperature"], RETRY_TEMPERATURE)
    return replace(call, body=body, sample=call.sample + attempt * 1000)
