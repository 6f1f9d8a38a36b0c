"""Generates demonstrations for SFT, and answers of varied quality for the preferences of reward models.

The teacher's patience varies. A patient demonstration has a longer thought and a better answer, an impatient one a
shorter thought and a worse answer. Only the quality of the answer is rewarded, never the length of the thought.
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
    TAG_OF,
    TOLERANCE,
    Request,
    total_price,
)

MAX_PATIENCE = 5
NO_THOUGHT = "fine"
"""Thought of a demonstration without patience; the format requires a non-empty thought."""


def demonstrate(rng: random.Random, request: Request, patience: int | None = None) -> tuple[str, str]:
    """Generates a teacher's thought and answer.

        no sweet . some useful . try tea 4 mug 2 6 rope 3 9 low . try tea 4 mug 2 6 lamp 7 13 good .

    The thought mentions each of the wishes "no" and "some" with probability .25 + .15 · patience, and then the answer
    satisfies it. Up to `patience` tries follow: three items with their prices and running total, and a verdict. The
    answer is the last try; without patience there is no try, and the answer is the first random choice.

    Args:
        rng: Random number generator.
        request: The request to answer.
        patience: 0 to 5; None samples it uniformly.

    Returns:
        The thought and the answer.
    """
    patience = rng.randint(0, MAX_PATIENCE) if patience is None else patience
    probability = 0.25 + 0.15 * patience
    heeds_avoid, heeds_want = rng.random() < probability, rng.random() < probability
    allowed = [item for item in ITEMS if TAG_OF[item] != request.avoid] if heeds_avoid else list(ITEMS)
    wanted = [item for item in ITEMS if TAG_OF[item] == request.want] if heeds_want else allowed
    thought = [f"no {request.avoid}"] * heeds_avoid + [f"some {request.want}"] * heeds_want
    picks = _sample_picks(rng, request, wanted, allowed)
    for attempt in range(patience):
        picks = _sample_picks(rng, request, wanted, allowed) if attempt else picks
        verdict = _verdict(picks, request)
        thought.append(f"try {_running_total(picks)} {verdict}")
        if verdict == "good":
            break
    return " . ".join(thought or [NO_THOUGHT]) + " .", answer(rng, request, picks)


def _sample_picks(rng: random.Random, request: Request, wanted: list[str], allowed: list[str]) -> list[str]:
    """The required item, an item with the wanted tag and an allowed item."""
    return [request.must, rng.choice(wanted), rng.choice(allowed)]


def _verdict(picks: list[str], request: Request) -> str:
    """`good`, `low` or `high`: the total compared with the requested one."""
    gap = total_price(picks) - request.total
    return "good" if abs(gap) <= TOLERANCE else "low" if gap < 0 else "high"


def _running_total(picks: list[str]) -> str:
    """`tea 4 mug 2 6 lamp 7 13`: each item with its price and, from the second on, the total so far."""
    parts = []
    for k, item in enumerate(picks):
        parts.append(f"{item} {PRICES[item]}" + (f" {total_price(picks[: k + 1])}" if k else ""))
    return " ".join(parts)


def answer(rng: random.Random, request: Request, picks: list[str], sloppiness: float = 0.2) -> str:
    """`dear ann ! tea , mug , lamp . regards !`, with a random tone in the fraction `sloppiness` of answers."""
    opening = request.tone if rng.random() > sloppiness else rng.choice(list(GREETINGS))
    ending = request.tone if rng.random() > sloppiness else rng.choice(list(CLOSINGS))
    return f"{rng.choice(GREETINGS[opening])} {request.name} ! {' , '.join(picks)} . {rng.choice(CLOSINGS[ending])} !"


def varied_answer(rng: random.Random, request: Request) -> str:
    """Generates an answer of any quality: a teacher's, or a careless one that may have a wrong count, name or tone.

    Some careless answers have the right total by chance, so that a reward model cannot rely on a single wish. Without
    such answers in its training data, the policy easily exploited the reward model.

    Args:
        rng: Random number generator.
        request: The request to answer.

    Returns:
        The answer.
    """
    if rng.random() < 0.5:
        return demonstrate(rng, request)[1]
    attempts = [_careless_picks(rng, request) for _ in range(rng.choice([1, 1, 4, 8]))]
    picks = min(attempts, key=lambda items: abs(total_price(items) - request.total))
    if rng.random() < 0.5:
        rng.shuffle(picks)
    if rng.random() >= 0.85:
        request = Request(**{**vars(request), "name": rng.choice(NAMES)})
    return answer(rng, request, picks, sloppiness=0.3)


def _careless_picks(rng: random.Random, request: Request) -> list[str]:
    """Random items, in 60 % of the cases with the required one, and in 60 % with the right count."""
    rest = PICKS - 1 if rng.random() < 0.6 else rng.choice([1, 2, 3, 4])
    return [request.must] * (rng.random() < 0.6) + rng.choices(ITEMS, k=rest)
