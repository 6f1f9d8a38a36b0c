"""Benchmarks that a rule scores: gold answers are full, wrong ones zero, and what `ours` mends of `authors`."""

import importlib
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from rlmt.errors import UserError
from rlmt.evaluation.benchmark import Item, Scoring
from rlmt.evaluation.benchmarks import BENCHMARKS
from rlmt.evaluation.benchmarks.hendrycks import equal_text
from rlmt.evaluation.benchmarks.math_500 import last_boxed

Data = Callable[[str], str]
GRID = {"House 1": {"Name": "Bob", "Food": "stew"}, "House 2": {"Name": "ann ", "Food": ["Stir Fry"]}}
LISTED = "kale leek leek beet beet beet " + "okra " * 5 + "corn " * 7 + "\U0001f600"

BOTH: list[tuple[str, int, str, float]] = [
    ("popqa", 0, "She is a politician.", 100),
    ("popqa", 0, "She is a nurse.", 0),
    ("popqa", 1, "It is called the City of Kings, that is lima!", 100),
    ("popqa", 1, "", 0),
    ("mmlu_redux", 0, "It is x.\n\nAnswer: B", 100),
    ("mmlu_redux", 0, "Answer: (B) x", 100),
    ("mmlu_redux", 0, "answer: **B**", 100),
    ("mmlu_redux", 0, "Answer: C", 0),
    ("mmlu_redux", 0, "The answer is B.", 0),
    ("mmlu_redux", 1, "Answer: D", 100),
    ("mmlu_redux", 1, "Answer: B", 0),
    ("ifeval", 0, "one two three", 100),
    ("ifeval", 0, "one two, three", 0),
    ("ifeval", 0, "one two", 0),
    ("math_500", 0, "So \\boxed{7}, no: $\\boxed{1000}$.", 100),
    ("math_500", 0, "So \\boxed{1000}, no: \\boxed{7}.", 0),
    ("math_500", 0, "1000", 0),
    ("math_500", 0, "\\boxed{1000", 0),
    ("math_500", 1, "\\boxed{\\dfrac12}", 100),
    ("math_500", 1, "\\boxed{0.5}", 100),
    ("zebra_logic", 0, json.dumps({"reasoning": "a {brace", "solution": GRID}), 100),
    ("zebra_logic", 0, f"First {{}} then ```json\n{json.dumps({'solution': GRID}, indent=2)}\n```", 100),
    ("zebra_logic", 0, json.dumps({"solution": GRID}).replace("Bob", "Ann"), 0),
    ("zebra_logic", 0, json.dumps({"solution": {"House 1": GRID["House 1"]}}), 0),
    ("zebra_logic", 0, json.dumps({"solution": GRID}) + ' {"solution": []}', 0),
    ("zebra_logic", 0, "House 1: Bob, stew", 0),
]
"""Benchmark, number of the item, response, and its score under either scoring."""

MENDED: list[tuple[str, int, str, float, float]] = [
    ("popqa", 0, "She is a police officer.", 100, 0),
    ("mmlu_redux", 0, "Answer: The correct option is B", 0, 100),
    ("mmlu_redux", 0, "Answer: A? No.\nAnswer: B", 0, 100),
    ("ifeval", 1, " ", 100, 0),
    ("math_500", 0, "\\boxed{1,000}", 0, 100),
    ("math_500", 1, "\\boxed{\\frac{2}{4}}", 0, 100),
]
"""Benchmark, number of the item, response, score under `authors`, score under `ours`."""

CASES = [(*case, scoring) for case in BOTH for scoring in ("ours", "authors")] + [
    (name, number, response, score, scoring)
    for name, number, response, *scores in MENDED
    for score, scoring in zip(scores, ("authors", "ours"), strict=True)
]


@pytest.mark.parametrize(("name", "number", "response", "expected", "scoring"), CASES)
def test_known_answers(name: str, number: int, response: str, expected: float, scoring: Scoring, data: Data) -> None:
    benchmark = BENCHMARKS[name](scoring)
    item = benchmark.load(data(name))[number]
    assert benchmark.questions(item, response) == []
    score = benchmark.score(item, response, [])
    assert (score.value, score.parsed) == (expected, True)


@pytest.mark.parametrize(
    ("response", "authors", "ours"),
    [
        (LISTED, 100, 100),
        ("Kale and leek.", 0, 0),
        ("Sure: here is a list with kale!\n" + LISTED, 0, 100),  # an introduction with a keyword too many
        ("", 0, 0),
        ("!!!", 0, 0),
    ],
)
def test_ifbench_is_strict_under_authors_and_loose_under_ours(
    response: str, authors: float, ours: float, data: Data
) -> None:
    (item,) = BENCHMARKS["ifbench"]().load(data("ifbench"))
    for scoring, expected in (("authors", authors), ("ours", ours)):
        assert BENCHMARKS["ifbench"](scoring).score(item, response, []).value == expected  # type: ignore[arg-type]


def test_checker_that_fails_on_punctuation_is_not_followed(data: Data) -> None:
    benchmark = BENCHMARKS["ifbench"]()
    (item,) = benchmark.load(data("ifbench"))
    item.data["instructions"] = [["format:quote_unquote", {}]]
    assert benchmark.score(item, "!!!", []).value == 0


def test_items_have_prompts_ids_and_no_answers_in_them(data: Data) -> None:
    prompts = {name: BENCHMARKS[name]().load(data(name)) for name in ("popqa", "mmlu_redux", "math_500", "zebra_logic")}
    assert [item.id for item in prompts["popqa"]] == ["42", "43"]
    assert [item.id for item in prompts["mmlu_redux"]] == ["0", "1"]  # the others have no right answer
    text = prompts["mmlu_redux"][0].messages[-1]["content"]
    assert "Q0\n\n" in text and "A. w\nB. x\nC. y\nD. z\n\nMark your final" in text
    assert prompts["math_500"][1].messages[-1]["content"] == "Half?\n\nEnclose your final answer in \\boxed{}."
    puzzle = prompts["zebra_logic"][0].messages[-1]["content"]
    assert "There are 2 houses. {form}\u2028\n" in puzzle  # one pass: a placeholder in a puzzle is text
    assert '"House 2": {\n            "Name": "___",' in puzzle and "stir fry" not in puzzle


def test_instructions_leave_the_global_generator_alone(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark: Any = BENCHMARKS["ifeval"]()
    item = benchmark.load(data("ifeval"))[0]
    item.data["instructions"] = [["keywords:letter_frequency", {"let_relation": "at least", "let_frequency": 2}]]
    state = random.getstate()
    first, second = (benchmark.checkers(item)[0].get_instruction_args()["letter"] for _ in range(2))
    assert random.getstate() == state and first == second


def test_unknown_instruction_is_an_error_of_the_check(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark: Any = BENCHMARKS["ifeval"]()
    monkeypatch.setattr(type(benchmark), "nltk_data", {})
    items = benchmark.load(data("ifeval"))
    benchmark.check(items)
    items[1].data["instructions"] = [["count:new", {}]]
    with pytest.raises(UserError, match="^ifeval: the instruction 'count:new' of prompt '1001' is unknown; remove it"):
        benchmark.check(items)


def test_missing_nltk_data_are_an_error_with_the_line_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    def items(*names: str) -> list[Item]:
        return [Item(name, [], {"instructions": [[name, {}]]}) for name in names]

    monkeypatch.setattr(nltk.data, "path", [])
    line = r"python -m nltk.downloader stopwords averaged_perceptron_tagger_eng punkt_tab\.$"
    with pytest.raises(UserError, match=f"^ifbench needs data of NLTK that are not installed: {line}"):
        BENCHMARKS["ifbench"]().check(items("words:start_verb", "ratio:stop_words", "count:numbers"))
    with pytest.raises(UserError, match=r"^ifeval needs .*: python -m nltk.downloader punkt_tab\.$"):
        BENCHMARKS["ifeval"]().check(items("length_constraints:number_sentences"))
    BENCHMARKS["ifbench"]().check(items("format:no_whitespace", "count:numbers"))


@pytest.mark.parametrize("name", ["ifeval", "ifbench"])
def test_instructions_that_need_nltk_data_are_those_whose_checkers_read_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the data, each checker of the package reads a text of many sentences, lines and words."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *names, **options: pytest.fail("a download was tried"))
    benchmark: Any = BENCHMARKS[name]()
    benchmark.checkers(Item("0", [], {"instructions": []}))  # imports the registry
    read, without_options = set(), set()
    for instruction, factory in importlib.import_module(benchmark.registry).INSTRUCTION_DICT.items():
        checker = factory(instruction)
        for text in ("One two three four five. " * 40, "* One two. Three four!\n\n" * 12):
            try:
                checker.build_description()
                checker.check_following(text)
            except LookupError as error:
                assert "nltk.download" in str(error)
                read.add(instruction)
            except (TypeError, ValueError):  # has no default for an option
                without_options.add(instruction)
    assert without_options <= {
        "combination:repeat_prompt",
        "ratio:overlap",
        "repeat:repeat_change",
        "repeat:repeat_span",
    }
    assert read == set(benchmark.nltk_data)


@pytest.mark.parametrize(
    ("name", "package"), [("ifeval", "if-verifiable"), ("ifbench", "if-verifiable"), ("math_500", "math-verify")]
)
def test_missing_package_is_an_error_with_the_line_that_installs_it(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=f"^{name} needs {package}, which is not installed: pip install {package}.$"):
        BENCHMARKS[name]().check()


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("\\frac12", "\\dfrac{1}{2}", True),
        ("1/2", "\\frac{1}{2}", True),
        ("x/2", "\\frac{x}{2}", False),
        ("\\frac1{72}", "\\frac{1}{72}", True),
        ("\\frac{7}2", "\\frac{7}{2}", False),
        ("\\sqrt3", "\\sqrt{3}", True),
        ("x = 5", "5", True),
        ("abc = 5", "5", False),
        ("90^\\circ", "90", True),
        ("5\\text{ cm}", "5", True),
        ("\\text{ a}\\text{ b}", "", False),
        (".5", "0.5", True),
        ("50\\%", "50", True),
        ("\\$5", "5", True),
        ("\\left( 1, 2 \\right)", "(1,2)", True),
        ("1,000", "1000", False),
        ("\\frac", "\\frac", True),
    ],
)
def test_normalization_of_answers(one: str, other: str, equal: bool) -> None:
    assert equal_text(one, other) is equal is equal_text(other, one)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{a{b}c} \\fbox{d}", "d"),
        ("\\boxed{a{b}c}.", "a{b}c"),
        ("\\boxed {1}", "1"),
        ("\\boxed{1", None),
        ("1", None),
    ],
)
def test_last_boxed(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected
