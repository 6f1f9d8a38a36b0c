r"""MATH-500: competition mathematics (https://arxiv.org/abs/2103.03874, https://arxiv.org/abs/2305.20050)."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence

from rlmt.data.tables import Cells
from rlmt.errors import UserError
from rlmt.evaluation.benchmark import Benchmark, Item, Score
from rlmt.evaluation.benchmarks.common import read_items, text_cell
from rlmt.evaluation.benchmarks.hendrycks import equal_text
from rlmt.types import Message

TIME_LIMIT = 30
"""Seconds for parsing an answer and for comparing two. The first answer loads the parser, which is slow under load."""


class MATH500(Benchmark):
    r"""100 if the answer in the last \boxed{} is the right one.

    `authors`: the two are equal as text after the normalization of Hendrycks et al. `ours`: they are, or math-verify
    finds them equal as mathematics, so that 1,000 equals 1000. It limits the time by an alarm signal, and scoring
    therefore runs in the main thread; an answer that takes longer is wrong.
    """

    name = "math_500"
    title = "MATH-500"
    source = "HuggingFaceH4/MATH-500"
    figures = ("accuracy",)

    def check(self, items: Sequence[Item] = ()) -> None:
        """Checks that math-verify is installed.

        Raises:
            UserError: It is not.
        """
        if self.scoring == "ours" and importlib.util.find_spec("math_verify") is None:
            raise UserError(f"{self.name} needs math-verify, which is not installed: pip install math-verify.")

    def load(self, path: str) -> list[Item]:
        """See `Benchmark.load`."""
        return read_items(self, path, ("problem", "answer", "unique_id"), _parse)

    def score(self, item: Item, response: str, answers: Sequence[str]) -> Score:
        """See `Benchmark.score`."""
        answer, gold = last_boxed(response), item.data["answer"]
        if answer is None:
            return Score(0.0)
        return Score(
            100.0 * (equal_text(gold, answer) or (self.scoring == "ours" and _equal_mathematics(gold, answer)))
        )


def _parse(index: int, cells: Cells) -> Item:
    prompt = f"{text_cell(cells, 'problem')}\n\nEnclose your final answer in \\boxed{{}}."
    return Item(str(cells["unique_id"]), [Message(role="user", content=prompt)], {"answer": text_cell(cells, "answer")})


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{} or \fbox{}, braces matched; None if there is none that is closed."""
    found = list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))
    if not found:
        return None
    start, depth = found[-1].end(), 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


def _equal_mathematics(gold: str, answer: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0)]
    expected, given = (
        parse(f"\\boxed{{{text}}}", extraction_config=config, parsing_timeout=TIME_LIMIT) for text in (gold, answer)
    )
    return bool(verify(expected, given, timeout_seconds=TIME_LIMIT))
