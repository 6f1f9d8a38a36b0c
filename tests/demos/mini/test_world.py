"""Requests, demonstrations and the rubric of the miniature world, checked with hand-written answers."""

import random
import statistics

import pytest

from rlmt.demos.mini import world
from rlmt.demos.mini.rubric import ASPECTS, aspects, quality, rubric
from rlmt.demos.mini.teacher import MAX_PATIENCE, demonstrate, varied_answer
from rlmt.demos.mini.tokenizer import make_tokenizer
from rlmt.demos.mini.world import PRICES, TAG_OF, Request, sample_request
from rlmt.formats.resolve import check_format
from rlmt.formats.thinking import ThinkingFormat

TEXT = "plan lunch for ann : be formal , no {avoid} , with {must} , spend about {total} , some {want} ."


def satisfied_request() -> tuple[Request, list[str]]:
    """A request and three items that satisfy it: the required one, one with the wanted tag, and another one."""
    must, want = "tea", next(tag for tag in world.TAGS if tag != TAG_OF["tea"])
    avoid = next(tag for tag in world.TAGS if tag not in (TAG_OF["tea"], want))
    wanted = next(item for item in world.ITEMS if TAG_OF[item] == want)
    other = next(item for item in world.ITEMS if TAG_OF[item] not in (avoid, want) and item != must)
    picks = [must, wanted, other]
    text = TEXT.format(avoid=avoid, must=must, want=want, total=sum(PRICES[item] for item in picks))
    return Request.parse(text), picks


def test_parse_inverts_request_text() -> None:
    rng = random.Random(0)
    for held_out in (False, True):
        for _ in range(200):
            request = sample_request(rng, held_out)
            assert Request.parse(request.text) == request
            assert request.held_out == held_out
    with pytest.raises(ValueError, match="This is not a request"):
        Request.parse("plan lunch for ann : be formal .")


def test_one_fifth_of_the_combinations_is_held_out() -> None:
    rng = random.Random(1)
    held_out = [world._sample_any_request(rng).held_out for _ in range(4000)]
    assert 0.17 < statistics.mean(held_out) < 0.23


def test_every_request_can_be_satisfied() -> None:
    rng = random.Random(2)
    for _ in range(50):
        r = sample_request(rng, True)
        allowed = [item for item in world.ITEMS if TAG_OF[item] != r.avoid]
        assert any(
            PRICES[r.must] + PRICES[a] + PRICES[b] == r.total for a in allowed if TAG_OF[a] == r.want for b in allowed
        )


def test_rubric_equals_manual_calculation() -> None:
    request, (must, wanted, other) = satisfied_request()
    answer = f"dear ann ! {must} , {wanted} , {other} . regards !"
    prompt = [{"role": "user", "content": request.text}]
    assert rubric(prompt, answer) == 100.0  # type: ignore[arg-type]
    assert quality(request, answer.replace("dear", "hey")) == 95.0
    assert quality(request, answer.replace("ann", "bob")) == 95.0
    assert quality(request, answer.replace("regards", "cheers")) == 95.0
    assert quality(request, "") == 0.0
    bad = next(item for item in world.ITEMS if TAG_OF[item] == request.avoid)
    off = abs(PRICES[bad] - PRICES[wanted])
    total = 40 * max(0.0, 1 - max(0, off - 1) / 5)
    assert quality(request, f"dear ann ! {must} , {bad} , {other} . regards !") == pytest.approx(20 + total)
    # Two items: no points for the count, and the other points are multiplied by 0.6.
    short = max(0, PRICES[other] - 1)
    expected = 10 + 0.6 * (20 + 20 + 40 * max(0.0, 1 - short / 5))
    assert quality(request, f"dear ann ! {must} , {wanted} . regards !") == pytest.approx(expected)


def test_aspects_equal_manual_calculation() -> None:
    request, (must, wanted, other) = satisfied_request()
    assert aspects(request, f"{must} {wanted} {other}") == [1, 1, 0, 1, 0, 0]
    gap = PRICES[must] - request.total
    expected = [0, 1, 0, 0, max(-1, gap / 6), min(1, max(0, -gap - 1) / 5)]
    assert aspects(request, must) == pytest.approx(expected)
    assert len(ASPECTS) == 6


def test_patient_demonstrations_are_longer_and_better() -> None:
    rng = random.Random(3)
    scores, lengths = [], []
    for patience in range(MAX_PATIENCE + 1):
        rows = []
        for _ in range(400):
            request = sample_request(rng, False)
            thought, answer = demonstrate(rng, request, patience)
            rows.append((quality(request, answer), len(thought.split())))
        scores.append(statistics.mean(score for score, _ in rows))
        lengths.append(statistics.mean(length for _, length in rows))
    assert lengths == sorted(lengths) and scores[-1] > scores[0] + 15


def test_thought_totals_are_correct_and_answer_is_the_last_try() -> None:
    rng = random.Random(4)
    for _ in range(300):
        request = sample_request(rng, False)
        thought, answer = demonstrate(rng, request)
        tries = [part.split()[1:] for part in thought.split(" . ") if part.startswith("try")]
        for words in tries:
            first, price, second, price2, sum2, third, price3, sum3, verdict = words[:9]
            assert [int(price), int(price2), int(price3)] == [PRICES[i] for i in (first, second, third)]
            assert int(sum2) == int(price) + int(price2) and int(sum3) == int(sum2) + int(price3)
            gap = int(sum3) - request.total
            assert verdict == ("good" if abs(gap) <= 1 else "low" if gap < 0 else "high")
        if tries:
            last = tries[-1]
            assert f"{last[0]} , {last[2]} , {last[5]}" in answer


def test_varied_answers_have_every_quality() -> None:
    rng = random.Random(5)
    scores = []
    for _ in range(500):
        request = sample_request(rng, False)
        scores.append(quality(request, varied_answer(rng, request)))
    assert min(scores) < 30 and max(scores) == 100 and statistics.stdev(scores) > 15


@pytest.mark.parametrize("name", ["think", "no_think"])
def test_every_text_round_trips_through_the_tokenizer(name: str) -> None:
    tokenizer, format, rng = make_tokenizer(), ThinkingFormat(name), random.Random(6)  # type: ignore[arg-type]
    check_format(format, tokenizer, "mini")
    for _ in range(100):
        request = sample_request(rng, False)
        thought, answer = demonstrate(rng, request)
        ids = tokenizer(format.target(thought, answer), add_special_tokens=False)["input_ids"]
        split = format.split(format.decode(ids, tokenizer))
        assert split.ok and split.response == answer and split.thought == (thought if format.thinks else "")
        prompt = format.render([{"role": "user", "content": request.text}], tokenizer)
        assert tokenizer.unk_token_id not in [*ids, *prompt]
    question, facts = world.price_list(rng)
    assert tokenizer.unk_token_id not in tokenizer(f"{question} {facts}")["input_ids"]
