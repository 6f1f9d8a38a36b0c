"""The base of rewards that ask another process: requests in the background, recorded answers, one line on failure."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rlmt.distributed import collectives
from rlmt.endpoints import BackgroundClient, Call, Endpoint, Ledger
from rlmt.errors import UserError
from rlmt.rewards.base import Reward
from rlmt.types import Prompt, Status

Pending = list[Future[list[dict[str, Any]]]]
"""Answers of one batch of calls, one future per endpoint; call i is sent to endpoint i modulo their number."""


class AskedReward(Reward):
    """A reward that sends requests to endpoints. An endpoint that fails in all attempts ends the run, resumable.

    Args:
        endpoints: Endpoints with the same answers; the requests of a batch are distributed evenly over them.
        ledger: File that keeps every answer; None keeps none. In a run of several ranks each rank has its own, with the
            rank in its name.
        name: Name under which the scores are logged.
    """

    asks = True

    def __init__(self, endpoints: Sequence[Endpoint], ledger: str | None, name: str) -> None:
        super().__init__()
        self.endpoints = list(endpoints)
        self.ledger = ledger
        self.name = name
        self._ledger: Ledger | None = None
        self._clients: list[BackgroundClient] = []
        self._pending: dict[tuple[str, ...], Pending] = {}

    def check(self) -> None:
        """Raises UserError if no requests can be sent to an endpoint."""
        if not self.endpoints:
            raise UserError(f"reward {self.name!r}: endpoints is empty; set at least one.")
        for endpoint in self.endpoints:
            endpoint.check(f"reward {self.name!r}: endpoint")

    def load(self) -> None:
        """Opens the ledger; connections are opened by the first request."""
        self.close()
        if self.ledger is not None:
            path = Path(self.ledger).expanduser()
            if collectives.world_size() > 1:
                path = path.with_name(f"{path.stem}.rank{collectives.rank()}{path.suffix}")
            self._ledger = Ledger(path)
        self._clients = [
            BackgroundClient(endpoint, self._ledger, f"start it, and {self.resume}") for endpoint in self.endpoints
        ]

    def close(self) -> None:
        """Waits for outstanding answers, then closes connections and the ledger."""
        for client in self._clients:
            client.close()
        if self._ledger is not None:
            self._ledger.close()
        self._clients, self._ledger, self._pending = [], None, {}

    @abstractmethod
    def first_calls(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Call]:
        """The requests for B responses that do not depend on answers."""

    def prefetch(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> None:
        """Starts the requests for B responses; see `Reward.prefetch`."""
        calls = self.first_calls(prompts, responses)
        self._pending = {_keys(calls): self._submit(calls)}

    def answers(self, calls: Sequence[Call]) -> list[dict[str, Any]]:
        """The answers to calls, in their order; those of `prefetch` if it started the same calls.

        Raises:
            UserError: An endpoint refuses a call or is lost.
        """
        futures = self._pending.pop(_keys(calls), None) or self._submit(calls)
        answers: list[dict[str, Any]] = [{}] * len(calls)
        try:
            for number, future in enumerate(futures):
                answers[number :: len(futures)] = future.result()
        except UserError:
            self.close()
            raise
        return answers

    def _submit(self, calls: Sequence[Call]) -> Pending:
        if not self._clients:
            raise RuntimeError(f"reward {self.name!r} is not loaded: call load() before score()")
        count = len(self._clients)
        return [client.submit(calls[number::count]) for number, client in enumerate(self._clients)]


def _keys(calls: Sequence[Call]) -> tuple[str, ...]:
    return tuple(call.key for call in calls)
