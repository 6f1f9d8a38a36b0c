"""The miniature world: 24 items with prices and tags, and requests to choose three of them under five wishes.

    plan lunch for ann : be formal , no sweet , with tea , spend about 13 , some useful .

What an item costs and is like is common knowledge: the same everywhere, stated in no request. A model learns it from
price lists among its demonstrations. Every request can be satisfied, for its total is that of a hidden valid choice.
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
"""Kind of plan → the verb of its wish about money."""
GREETINGS = {"friendly": ("hello", "hi", "hey"), "formal": ("dear", "greetings")}
CLOSINGS = {"friendly": ("enjoy", "cheers"), "formal": ("regards", "sincerely")}
PICKS = 3
"""Items of a good answer."""
HIGHEST_PRICE = 9
SLACK = 1
"""How far from the wished total a choice may be."""

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
    """What somebody asks for."""

    kind: str
    """What is planned, a key of `KINDS`."""
    name: str
    """Whom it is for and the answer has to greet."""
    tone: str
    """friendly or formal: of greeting and closing."""
    avoid: str
    """Tag that no item may have."""
    want: str
    """Tag that one item has to have."""
    must: str
    """Item that has to be among them."""
    total: int
    """What they should cost together, give or take `SLACK`."""
    text: str
    """The request in words, its five wishes in any order."""

    @property
    def held_out(self) -> bool:
        """Whether it asks for a combination of wishes that training never holds: a fifth of all are kept back."""
        return zlib.crc32(f"{self.total} {self.avoid} {self.want} {self.must}".encode()) % 5 == 0

    @classmethod
    def parse(cls, text: str) -> Request:
        """Reads a request back from its words.

        Raises:
            ValueError: the text is none of this world's requests.
        """
        match = _REQUEST.fullmatch(text.strip())
        found = {} if match is None else _wishes(match[3])
        if match is None or len(found) != len(_WISHES):
            raise ValueError(f"not a request of the miniature world: {text[:80]!r}")
        total = int(found.pop("total"))
        return cls(kind=match[1], name=match[2], total=total, text=text.strip(), **found)


def _wishes(text: str) -> dict[str, str]:
    found = {}
    for part in text.split(" , "):
        for wish, pattern in _WISHES.items():
            if match := pattern.fullmatch(part):
                found[wish] = match[1]
    return found


def draw_request(rng: random.Random, held_out: bool) -> Request:
    """Draws a request, of the combinations kept back from training or of the others."""
    while True:
        request = _draw(rng)
        if request.held_out == held_out:
            return request


def _draw(rng: random.Random) -> Request:
    kind = rng.choice(list(KINDS))
    avoid, want = rng.sample(TAGS, 2)
    allowed = [item for item in ITEMS if TAG_OF[item] != avoid]
    must = rng.choice(allowed)
    hidden = [must, rng.choice([item for item in ITEMS if TAG_OF[item] == want]), rng.choice(allowed)]
    total = cost(hidden)
    name, tone = rng.choice(NAMES), rng.choice(list(GREETINGS))
    wishes = [f"{KINDS[kind]} about {total}", f"no {avoid}", f"some {want}", f"with {must}", f"be {tone}"]
    rng.shuffle(wishes)
    text = f"plan {kind} for {name} : {' , '.join(wishes)} ."
    return Request(kind, name, tone, avoid, want, must, total, text)


def cost(items: list[str]) -> int:
    """What items cost together."""
    return sum(PRICES[item] for item in items)


def price_list(rng: random.Random) -> tuple[str, str]:
    """A question of fact and its answer: all items in any order with price and tag."""
    items = rng.sample(ITEMS, len(ITEMS))
    return "list the prices .", " ".join(f"{item} {PRICES[item]} {TAG_OF[item]}" for item in items)


def words() -> list[str]:
    """Every word that a request, a thought or an answer of this world can hold, sorted."""
    found = {*ITEMS, *TAGS, *NAMES, *KINDS, *KINDS.values(), *GREETINGS, ",", ".", ":", "!"}
    found.update(word for group in (*GREETINGS.values(), *CLOSINGS.values()) for word in group)
    found.update(re.findall(r"\w+", "plan for about no some with be, try low high good fine, list the prices"))
    found.update(str(number) for number in range(HIGHEST_PRICE * PICKS + 1))
    return sorted(found)
