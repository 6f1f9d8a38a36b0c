"""Who writes demonstrations, and who writes worse answers for the reward model to tell from better ones.

The teacher's patience varies. A thorough demonstration is longer and better, a shallow one shorter and worse, and
nothing but the outcome says which: no length is rewarded anywhere.
"""

from __future__ import annotations

import random

from rlmt.demos.mini.world import (
    CLOSINGS,
    GREETINGS,
    ITEMS,
    NAMES,
    PICKS,
    PRICES,
    SLACK,
    TAG_OF,
    Request,
    cost,
)

MOST_PATIENT = 5
NO_THOUGHT = "fine"
"""All that is thought without patience: every demonstration has some thought, for the format wants one."""


def demonstrate(rng: random.Random, request: Request, patience: int | None = None) -> tuple[str, str]:
    """A teacher's thought and answer.

        no sweet . some useful . try tea 4 mug 2 6 rope 3 9 low . try tea 4 mug 2 6 lamp 7 13 good .

    Each of the wishes "no" and "some" is gone through, and obeyed, with probability .25 + .15 · patience. Then follow
    up to `patience` tries: three items with their prices and running total, and a verdict. The answer is the last try;
    without patience nothing is tried and the first idea is the answer.

    Args:
        rng: where chance comes from.
        request: what is asked.
        patience: 0 to 5; None draws it.

    Returns:
        Thought and answer.
    """
    patience = rng.randint(0, MOST_PATIENT) if patience is None else patience
    care = 0.25 + 0.15 * patience
    minds_avoid, minds_want = rng.random() < care, rng.random() < care
    allowed = [item for item in ITEMS if TAG_OF[item] != request.avoid] if minds_avoid else list(ITEMS)
    wanted = [item for item in ITEMS if TAG_OF[item] == request.want] if minds_want else allowed
    thought = [f"no {request.avoid}"] * minds_avoid + [f"some {request.want}"] * minds_want
    picks = _idea(rng, request, wanted, allowed)
    for attempt in range(patience):
        picks = _idea(rng, request, wanted, allowed) if attempt else picks
        verdict = _verdict(picks, request)
        thought.append(f"try {_sum(picks)} {verdict}")
        if verdict == "good":
            break
    return " . ".join(thought or [NO_THOUGHT]) + " .", answer(rng, request, picks)


def _idea(rng: random.Random, request: Request, wanted: list[str], allowed: list[str]) -> list[str]:
    return [request.must, rng.choice(wanted), rng.choice(allowed)]


def _verdict(picks: list[str], request: Request) -> str:
    gap = cost(picks) - request.total
    return "good" if abs(gap) <= SLACK else "low" if gap < 0 else "high"


def _sum(picks: list[str]) -> str:
    """`tea 4 mug 2 6 lamp 7 13`: each item with its price and, from the second on, the total so far."""
    parts = []
    for k, item in enumerate(picks):
        parts.append(f"{item} {PRICES[item]}" + (f" {cost(picks[: k + 1])}" if k else ""))
    return " ".join(parts)


def answer(rng: random.Random, request: Request, picks: list[str], sloppiness: float = 0.2) -> str:
    """`dear ann ! tea , mug , lamp . regards !` - in the wished tone but for the share `sloppiness`."""
    opening = request.tone if rng.random() > sloppiness else rng.choice(list(GREETINGS))
    ending = request.tone if rng.random() > sloppiness else rng.choice(list(CLOSINGS))
    return f"{rng.choice(GREETINGS[opening])} {request.name} ! {' , '.join(picks)} . {rng.choice(CLOSINGS[ending])} !"


def any_answer(rng: random.Random, request: Request) -> str:
    """An answer of any quality: a teacher's, or a careless one with a wrong count, name or tone.

    Among careless ones are totals that fit by luck, so that a reward model cannot go by any one wish alone; without
    such answers in its training it was easily fooled.
    """
    if rng.random() < 0.5:
        return demonstrate(rng, request)[1]
    attempts = [_careless(rng, request) for _ in range(rng.choice([1, 1, 4, 8]))]
    picks = min(attempts, key=lambda items: abs(cost(items) - request.total))
    if rng.random() < 0.5:
        rng.shuffle(picks)
    if rng.random() >= 0.85:
        request = Request(**{**vars(request), "name": rng.choice(NAMES)})
    return answer(rng, request, picks, sloppiness=0.3)


def _careless(rng: random.Random, request: Request) -> list[str]:
    rest = PICKS - 1 if rng.random() < 0.6 else rng.choice([1, 2, 3, 4])
    return [request.must] * (rng.random() < 0.6) + rng.choices(ITEMS, k=rest)
