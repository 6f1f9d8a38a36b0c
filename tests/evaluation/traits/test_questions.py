"""Answers about thoughts are read strictly, and the order of two thoughts depends on the seed alone."""

import math
from dataclasses import replace

import pytest
from rich.console import Console

from rlmt.evaluation.compare.pairs import Pair
from rlmt.evaluation.traits.discovery import choose_batches
from rlmt.evaluation.traits.questions import Trait, judge_question, read_list, read_traits, read_winner, swapped
from rlmt.evaluation.traits.results import draw_traits, markdown, terminal_table, trait_result
from rlmt.types import Prompt, Split, Status

TRAIT = Trait("Lists constraints", "The thought states the requirements first.")


def pair(index: int) -> Pair:
    splits = [Split(f"thought of {name} on {index}", "fine", Status.OK) for name in ("A", "B")]
    return Pair(Prompt(index, [{"role": "user", "content": "Hi"}]), *splits)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("It plans.\n\n- one\n- **two**\n* three", ["one", "two", "three"]),
        ("1. one\n2) two\n\n3. three\n", ["one", "two", "three"]),
        ("- before\n\nText.\n- one\n- two\n- three", ["one", "two", "three"]),
        ("- one\n- two", None),
        ("- one\n- two\n- three\nThat is all.", None),
        ("- 1\n- 2\n- 3\n- 4\n- 5\n- 6\n- 7\n- 8\n- 9", None),
        ("", None),
    ],
)
def test_list_is_what_the_answer_ends_with(text: str, items: list[str] | None) -> None:
    assert read_list(text, 3, 8) == items


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Merged.\n- One thing: It does one: twice.\n- Two things: It does two.", 2),
        ("- One thing\n- Two things: It does two.", None),
        ("- One thing: a\n- one thing: b", None),
        ("- A: a\n- B: b\n- C: c\n- D: d", None),
    ],
)
def test_traits_have_distinct_names_and_descriptions(text: str, count: int | None) -> None:
    found = read_traits(text, 3)
    assert (None if found is None else len(found)) == count
    assert not count or found[0] == Trait("One thing", "It does one: twice.")  # type: ignore[index]


def test_order_is_by_seed_and_is_undone_when_the_verdict_is_read() -> None:
    pairs = [pair(index) for index in range(400)]
    orders = [swapped(each.prompt, TRAIT.name, 1) for each in pairs]
    assert 160 < sum(orders) < 240 and orders != [swapped(each.prompt, TRAIT.name, 2) for each in pairs]
    for each, b_first in zip(pairs[:20], orders, strict=False):
        text = judge_question(each, TRAIT, 1, 64).messages[0]["content"]
        first, second = ("B", "A") if b_first else ("A", "B")
        assert text.index(f"thought of {first}") < text.index(f"thought of {second}")
        assert read_winner("So.\nMore: A", each, TRAIT, 1) == first.lower()
        assert read_winner("So.\n**More: tie**", each, TRAIT, 1) == "tie"
        assert read_winner("More: A or B", each, TRAIT, 1) is None


def test_batches_are_complete_unless_there_is_only_one() -> None:
    pairs = [pair(index) for index in range(50)]
    sizes = [len(batch) for batch in choose_batches(pairs, 10, 20, 0)]
    assert sizes == [20, 20] and [len(batch) for batch in choose_batches(pairs[:7], 10, 20, 0)] == [7]
    assert [len(batch) for batch in choose_batches(pairs, 1, 20, 0)] == [20]
    chosen = {each.prompt.index for batch in choose_batches(pairs, 10, 20, 0) for each in batch}
    assert len(chosen) == 40 and chosen != set(range(40))


def test_terminal_shows_the_brackets_of_traits_and_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    result = trait_result(replace(TRAIT, name="trait [x]"), [None], 0)
    Console(width=200).print(terminal_table([result], ("A [1]", "B")))
    printed = capsys.readouterr().out
    assert "trait [x]" in printed and "A [1] [95 %]" in printed and printed.count(" nan [nan, nan]") == 3


def test_shares_are_over_prompts_with_a_verdict() -> None:
    result = trait_result(TRAIT, ["a"] * 6 + ["tie"] * 3 + ["b"] * 1 + [None] * 5, 0)
    assert {outcome: share.value for outcome, share in result.shares.items()} == {"a": 0.6, "tie": 0.3, "b": 0.1}
    assert (result.difference.value, result.judged, result.unparsed) == (pytest.approx(0.5), 10, 5)
    assert 0 <= result.shares["a"].low < 0.6 < result.shares["a"].high <= 1 and not math.isnan(result.difference.low)


def test_report_has_a_row_and_a_bar_for_each_trait(tmp_path) -> None:  # type: ignore[no-untyped-def]
    results = [trait_result(Trait(f"Trait {n}", "A thought."), ["a"] * n + ["b"] * (9 - n), 0) for n in (7, 4)]
    text = markdown(results, ("new", "old"), ["A note."], "traits.png")
    assert "| Trait 7 | 77.8 [" in text and "- **Trait 4**: A thought." in text and "![" in text
    assert draw_traits(results, ("new", "old"), tmp_path / "traits.png").read_bytes()[:4] == b"\x89PNG"
