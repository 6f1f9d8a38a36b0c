"""Finds the traits in which two policies' thoughts differ: traits of each thought, differences in batches, one list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlmt.data.sampler import shuffled
from rlmt.errors import UserError
from rlmt.evaluation.benchmark import Question
from rlmt.evaluation.compare.pairs import Pair
from rlmt.evaluation.traits.questions import (
    MAX_DIFFERENCES,
    MAX_TRAITS,
    MIN_TRAITS,
    Trait,
    compare_question,
    describe_question,
    read_list,
    read_traits,
    summary_question,
    swapped,
)

Ask = Callable[[str, Sequence[Question], Callable[[int, str], bool]], list[str]]
"""Asks questions under a label until the answers can be read, and returns the last answer to each."""


@dataclass(frozen=True)
class Discovery:
    """The traits, and what they come from."""

    traits: list[Trait]
    """The list."""
    thoughts: list[dict[str, Any]]
    """For each prompt its row number and the traits of A's and B's thought."""
    differences: list[list[str]]
    """The differences of each batch."""

    def to_json(self) -> dict[str, Any]:
        """Traits of the thoughts and differences, as JSON values."""
        return {"thoughts": self.thoughts, "differences": self.differences}


def choose_batches(pairs: Sequence[Pair], batches: int, batch_prompts: int, seed: int) -> list[list[Pair]]:
    """Chooses the prompts whose thoughts are described; an incomplete batch is left out unless it is the only one.

    Args:
        pairs: Well-formed pairs.
        batches: Maximum number of batches.
        batch_prompts: Prompts in a batch.
        seed: Seed of the choice.
    """
    order = shuffled([pair.prompt.index for pair in pairs], seed, "traits")
    parts = [order[start : start + batch_prompts] for start in range(0, len(order), batch_prompts)][:batches]
    complete = [part for part in parts if len(part) == batch_prompts] or parts
    return [[pairs[position] for position in part] for part in complete]


def discover(batches: Sequence[Sequence[Pair]], ask: Ask, most: int, seed: int, max_tokens: int) -> Discovery:
    """Asks for the traits of each thought, for the differences in each batch, and for one list.

    Thoughts, differences and lists whose answer cannot be read are left out.

    Args:
        batches: Well-formed pairs.
        ask: Asks the judge.
        most: Maximum number of traits in the list.
        seed: Decides which policy a comparison shows first.
        max_tokens: Maximum length of an answer in tokens.

    Raises:
        UserError: No batch has a difference that can be read, or the list cannot be read.
    """
    pairs = [pair for batch in batches for pair in batch]
    questions = [describe_question(p.prompt, s.thought, max_tokens) for p in pairs for s in (p.first, p.second)]
    found = [
        read_list(text, MIN_TRAITS, MAX_TRAITS) or []
        for text in ask("traits of thoughts", questions, lambda _, text: bool(read_list(text, MIN_TRAITS, MAX_TRAITS)))
    ]
    thoughts: list[dict[str, Any]] = [
        {"prompt": pair.prompt.index, "a": found[2 * n], "b": found[2 * n + 1]} for n, pair in enumerate(pairs)
    ]
    sets: list[Question] = []
    start = 0
    for batch in batches:
        rows, start = thoughts[start : start + len(batch)], start + len(batch)
        both = [[trait for row in rows for trait in row[policy]] for policy in ("a", "b")]
        if all(both):
            first, second = reversed(both) if swapped(batch[0].prompt, "differences", seed) else both
            sets.append(compare_question(first, second, len(batch), max_tokens))
    answers = ask("differences", sets, lambda _, text: bool(read_list(text, 1, MAX_DIFFERENCES)))
    differences = [listed for text in answers if (listed := read_list(text, 1, MAX_DIFFERENCES))]
    if not differences:
        raise UserError("--judge: no answer lists differences between the thoughts; use a stronger judge.")
    summary = summary_question([item for listed in differences for item in listed], len(differences), most, max_tokens)
    (text,) = ask("list of traits", [summary], lambda _, text: bool(read_traits(text, most)))
    traits = read_traits(text, most)
    if traits is None:
        raise UserError("--judge: no answer has a list of traits with names and descriptions; use a stronger judge.")
    return Discovery(traits, thoughts, differences)
