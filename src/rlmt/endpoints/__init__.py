"""Requests to OpenAI-compatible endpoints and other HTTP services: concurrency, retries, a ledger of answers, cost."""

from rlmt.endpoints.background import BackgroundClient
from rlmt.endpoints.calls import Call, ChatAnswer, Usage, chat_call
from rlmt.endpoints.client import CONTINUE, CostLimitReached, EndpointClient, EndpointError, RequestRejected
from rlmt.endpoints.endpoint import Endpoint
from rlmt.endpoints.ledger import Ledger
from rlmt.endpoints.meter import Meter

__all__ = [
    "CONTINUE",
    "BackgroundClient",
    "Call",
    "ChatAnswer",
    "CostLimitReached",
    "Endpoint",
    "EndpointClient",
    "EndpointError",
    "Ledger",
    "Meter",
    "RequestRejected",
    "Usage",
    "chat_call",
]
