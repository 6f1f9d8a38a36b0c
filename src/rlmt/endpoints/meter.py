"""Counts requests, tokens and cost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rlmt.endpoints.calls import Call, Usage
from rlmt.endpoints.endpoint import Endpoint


class Meter:
    """Counts of one endpoint; with a cost limit, calls wait until they cannot exceed it.

    Args:
        endpoint: Endpoint with prices and cost limit.
        usage: Billed tokens of earlier starts.
    """

    def __init__(self, endpoint: Endpoint, usage: Usage) -> None:
        self.usage = usage
        """Billed tokens, with those of earlier starts."""
        self.answers = 0
        """Answers received."""
        self.reused = 0
        """Answers from the ledger."""
        self.failures = 0
        """Failed attempts, repeated or not."""
        self._endpoint = endpoint
        self._outstanding: list[float] = []
        self._changed = asyncio.Condition()

    @property
    def cost(self) -> float | None:
        """US dollars, or None if a price is unknown."""
        return self.price(self.usage)

    def price(self, usage: Usage) -> float | None:
        """US dollars for a number of tokens, or None if a price is unknown."""
        endpoint = self._endpoint
        if endpoint.input_price is None or endpoint.output_price is None:
            return None
        return (usage.prompt_tokens * endpoint.input_price + usage.completion_tokens * endpoint.output_price) / 1e6

    @asynccontextmanager
    async def reserve(self, call: Call) -> AsyncIterator[bool]:
        """Sets the largest possible cost of a call aside while it is outstanding.

        Args:
            call: The call.

        Yields:
            Whether the call fits the cost limit. Before it yields False, it waits for all outstanding calls, since most
            cost less than was set aside for them.
        """
        if self._endpoint.max_cost is None:
            yield True
            return
        most = self.price(largest_usage(call)) or 0.0
        async with self._changed:
            await self._changed.wait_for(lambda: self._fits(most) or not self._outstanding)
            if allowed := self._fits(most):
                self._outstanding.append(most)
        try:
            yield allowed
        finally:
            if allowed:
                self._outstanding.remove(most)
            async with self._changed:
                self._changed.notify_all()

    def _fits(self, most: float) -> bool:
        """Whether another call that costs at most this much keeps the total within the limit."""
        limit = self._endpoint.max_cost
        return limit is None or (self.cost or 0.0) + sum(self._outstanding) + most <= limit


def largest_usage(call: Call) -> Usage:
    """The most tokens that a chat call may be billed: a token has at least one byte, more than a template adds."""
    completion = call.body.get("max_tokens") or call.body.get("max_completion_tokens") or 0
    return Usage(len(json.dumps(call.body, ensure_ascii=False).encode()), int(completion))
