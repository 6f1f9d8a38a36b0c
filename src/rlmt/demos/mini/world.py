"""The task of the miniature world: choose three of 24 items with prices and tags, under five wishes.

    plan lunch for ann : be formal , no sweet , with tea , spend about 13 , some useful .

Prices and tags are the same in every world and appear in no request; a model learns them from the price lists among its
demonstrations. Every request can be satisfied, because its total is that of a hidden valid choice.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass

ITEMS = (
    "tea", "soup", "pie", "rice", "fish", "cake", "hat", "boots", "map", "rope", "tent", "lamp",
    "mug", "scarf", "plant", "candle", "puzzle", "soap", "pen", "ball", "kite", "doll", "frame", "clock",
)  # fmt: skip
TAGS = ("cozy", "sweet", "useful", "funny")
NAMES = ("ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal")
KINDS = {"lunch": "spend", "trip": "spend", "party": "pay", "gift": "pay"}
"""Kind of plan → the verb in its wish for a total."""
GREETINGS = {"friendly": ("hello", "hi", "hey"), "formal": ("dear", "greetings")}
CLOSINGS = {"friendly": ("enjoy", "cheers"), "formal": ("regards", "sincerely")}
PICKS = 3
"""Number of items in a correct answer."""
HIGHEST_PRICE = 9
TOLERANCE = 1
"""Allowed difference between the total of an answer and the requested total."""

_shuffle = random.Random(42)
PRICES = {item: 1 + k % HIGHEST_PRICE for k, item in enumerate(_shuffle.sample(ITEMS, len(ITEMS)))}
TAG_OF = {item: TAGS[k % len(TAGS)] for k, item in enumerate(_shuffle.sample(ITEMS, len(ITEMS)))}

_REQUEST = re.compile(r"plan (\w+) for (\w+) : (.+) \.")
_WISHES = {
    "total": re.compile(r"(?:spend|pay) about (\d+)"),
    "avoid": re.compile(r"no (\w+)"),
    "want": re.compile(r"some (\w+)"),
    "must": re.compile(r"with (\w+)"),
    "tone": re.compile(r"be (\w+)"),
}


@dataclass(frozen=True)
class Request:
    """A request with its five wishes."""

    kind: str
    """Kind of plan, a key of `KINDS`."""
    name: str
    """Name of the person to greet."""
    tone: str
    """Tone of greeting and closing, friendly or formal."""
    avoid: str
    """Tag that no item may have."""
    want: str
    """Tag that at least one item must have."""
    must: str
    """Item that must be included."""
    total: int
    """Requested total price; it may be off by `TOLERANCE`."""
    text: str
    """The request as text, with the wishes in any order."""

    @property
    def held_out(self) -> bool:
        """Whether the combination of wishes is held out from training, as one in five is."""
        return zlib.crc32(f"{self.total} {self.avoid} {self.want} {self.must}".encode()) % 5 == 0

    @classmethod
    def parse(cls, text: str) -> Request:
        """Parses the text of a request.

        Args:
            text: The text.

        Returns:
            The request.

        Raises:
            ValueError: The text is not a request of the miniature world.
        """
        match = _REQUEST.fullmatch(text.strip())
        found = {} if match is None else _parse_wishes(match[3])
        if match is None or len(found) != len(_WISHES):
            raise ValueError(f"This is not a request of the miniature world: {text[:80]!r}.")
        total = int(found.pop("total"))
        return cls(kind=match[1], name=match[2], total=total, text=text.strip(), **found)


def _parse_wishes(text: str) -> dict[str, str]:
    """Wish → value, for each wish found in the text."""
    found = {}
    for part in text.split(" , "):
        for wish, pattern in _WISHES.items():
            if match := pattern.fullmatch(part):
                found[wish] = match[1]
    return found


def sample_request(rng: random.Random, held_out: bool) -> Request:
    """Samples a request whose combination of wishes is held out from training, or one whose combination is not."""
    while True:
        request = _sample_any_request(rng)
        if request.held_out == held_out:
            return request


def _sample_any_request(rng: random.Random) -> Request:
    """Samples a request with any combination of wishes."""
    kind = rng.choice(list(KINDS))
    avoid, want = rng.sample(TAGS, 2)
    allowed = [item for item in ITEMS if TAG_OF[item] != avoid]
    must = rng.choice(allowed)
    hidden = [must, rng.choice([item for item in ITEMS if TAG_OF[item] == want]), rng.choice(allowed)]
    total = total_price(hidden)
    name, tone = rng.choice(NAMES), rng.choice(list(GREETINGS))
    wishes = [f"{KINDS[kind]} about {total}", f"no {avoid}", f"some {want}", f"with {must}", f"be {tone}"]
    rng.shuffle(wishes)
    text = f"plan {kind} for {name} : {' , '.join(wishes)} ."
    return Request(kind, name, tone, avoid, want, must, total, text)


def total_price(items: list[str]) -> int:
    """Returns the sum of the prices."""
    return sum(PRICES[item] for item in items)


def price_list(rng: random.Random) -> tuple[str, str]:
    """Returns a question and its answer: all items in random order with price and tag."""
    items = rng.sample(ITEMS, len(ITEMS))
    return "list the prices .", " ".join(f"{item} {PRICES[item]} {TAG_OF[item]}" for item in items)


def vocabulary() -> list[str]:
    """Returns every word that a request, a thought or an answer can contain, sorted."""
    found = {*ITEMS, *TAGS, *NAMES, *KINDS, *KINDS.values(), *GREETINGS, ",", ".", ":", "!"}
    found.update(word for group in (*GREETINGS.values(), *CLOSINGS.values()) for word in group)
    found.update(re.findall(r"\w+", "plan for about no some with be, try low high good fine, list the prices"))
    found.update(str(number) for number in range(HIGHEST_PRICE * PICKS + 1))
    return sorted(found)
