"""The hidden rubric: scores an answer without its thought. It is for evaluation, not for training."""

from __future__ import annotations

from rlmt.demos.mini.world import CLOSINGS, GREETINGS, PICKS, PRICES, TAG_OF, TOLERANCE, Request, total_price
from rlmt.types import Message

ASPECTS = ("count", "must", "avoid", "want", "gap", "distance")
"""Attributes that raters rate besides the preference: the number of items is right; the required item is included; an
item with the avoided tag is included; an item with the wanted tag is included; signed error of the total; error of the
total beyond the tolerance."""


def rubric(prompt: list[Message], response: str) -> float:
    """Scores a response with 0 to 100 points.

    10 points for three items that include the required one; 5 each for a greeting and a closing in the requested tone;
    20 if no item has the avoided tag; 20 if an item has the wanted tag; 40 for the total, falling to 0 where it is off
    by six. A wrong number of items scales the last three down.

    Args:
        prompt: Conversation whose last turn is a request.
        response: Text shown to the user.

    Returns:
        The points.

    Raises:
        ValueError: The last turn is not a request of the miniature world.
    """
    return quality(Request.parse(prompt[-1]["content"]), response)


def quality(request: Request, response: str) -> float:
    """Returns the points of `rubric` for a parsed request."""
    words = response.split()
    items = [word for word in words if word in PRICES]
    count_factor = max(0.0, 1 - 0.4 * abs(len(items) - PICKS)) if items else 0.0
    greeted = len(words) > 1 and words[0] in GREETINGS[request.tone] and words[1] == request.name
    closed = len(words) > 1 and words[-2] in CLOSINGS[request.tone] and words[-1] == "!"
    tags = [TAG_OF[item] for item in items]
    error = max(0, abs(total_price(items) - request.total) - TOLERANCE)
    points = 10.0 * (len(items) == PICKS and request.must in items) + 5.0 * greeted + 5.0 * closed
    wishes = 20.0 * (request.avoid not in tags) + 20.0 * (request.want in tags) + 40.0 * max(0.0, 1 - error / 5)
    return points + count_factor * wishes


def aspects(request: Request, response: str) -> list[float]:
    """Returns a rater's ratings of a response, one number for each of `ASPECTS`."""
    items = [word for word in response.split() if word in PRICES]
    tags = [TAG_OF[item] for item in items]
    gap = total_price(items) - request.total
    return [
        float(len(items) == PICKS),
        float(request.must in items),
        float(request.avoid in tags),
        float(request.want in tags),
        max(-1.0, min(1.0, gap / 6)),
        min(1.0, max(0, abs(gap) - TOLERANCE) / 5),
    ]
