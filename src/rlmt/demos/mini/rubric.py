"""The hidden rubric: how good an answer is. It reads the answer alone, and is for evaluation, not for training."""

from __future__ import annotations

from rlmt.demos.mini.world import CLOSINGS, GREETINGS, PICKS, PRICES, SLACK, TAG_OF, Request, cost
from rlmt.types import Message

ASPECTS = ("count", "must", "avoid", "want", "gap", "distance")
"""What raters are asked besides which answer is better: right number of items, the required one among them, an avoided
one among them, a wanted one among them, how far the total is off with its sign, and how far beyond the slack."""


def rubric(prompt: list[Message], response: str) -> float:
    """How good a response is: 0 to 100 points.

    10 for three items with the required one; 5 each for a greeting and a closing in the wished tone; 20 if nothing has
    the avoided tag; 20 if something has the wanted one; 40 for the total, falling to 0 where it is off by six. A wrong
    number of items scales the last three down.

    Args:
        prompt: a conversation whose last turn is a request.
        response: what the user is shown.

    Raises:
        ValueError: the prompt is none of this world's requests.
    """
    return quality(Request.parse(prompt[-1]["content"]), response)


def quality(request: Request, response: str) -> float:
    """As `rubric`, for a request already read."""
    words = response.split()
    items = [word for word in words if word in PRICES]
    full = max(0.0, 1 - 0.4 * abs(len(items) - PICKS)) if items else 0.0
    greeted = len(words) > 1 and words[0] in GREETINGS[request.tone] and words[1] == request.name
    closed = len(words) > 1 and words[-2] in CLOSINGS[request.tone] and words[-1] == "!"
    tags = [TAG_OF[item] for item in items]
    off = max(0, abs(cost(items) - request.total) - SLACK)
    points = 10.0 * (len(items) == PICKS and request.must in items) + 5.0 * greeted + 5.0 * closed
    wishes = 20.0 * (request.avoid not in tags) + 20.0 * (request.want in tags) + 40.0 * max(0.0, 1 - off / 5)
    return points + full * wishes


def aspects(request: Request, response: str) -> list[float]:
    """What a rater observes of a response, one number for each of `ASPECTS`."""
    items = [word for word in response.split() if word in PRICES]
    tags = [TAG_OF[item] for item in items]
    gap = cost(items) - request.total
    return [
        float(len(items) == PICKS),
        float(request.must in items),
        float(request.avoid in tags),
        float(request.want in tags),
        max(-1.0, min(1.0, gap / 6)),
        min(1.0, max(0, abs(gap) - SLACK) / 5),
    ]
