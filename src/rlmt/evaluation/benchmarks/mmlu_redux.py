"""MMLU-Redux: MMLU's multiple choice with annotated errors (https://arxiv.org/abs/2406.04127)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlmt.data.tables import Cells
from rlmt.evaluation.benchmark import Benchmark, Item, Score
from rlmt.evaluation.benchmarks.common import json_cell, read_items, text_cell
from rlmt.types import Message

PROMPT = (
    "Please answer the following question:\n\n{question}\n\nSelect the correct answer from the following options:\n\n"
    '{options}\n\nMark your final uppercase letter answer after "Answer:"'
)
LETTERS = "ABCD"
_LETTER = re.compile(rf"(?<![A-Za-z0-9])[{LETTERS}](?![A-Za-z0-9])")


class MMLURedux(Benchmark):
    """100 if the letter after "Answer:" is the right one.

    Only questions without an error count, and those with a wrong key whose right one is known: 5,376 of 5,700.

    `ours`: the first letter that stands alone after the last "Answer:". `authors`: the first capital of any word after
    the first "Answer:", so that "Answer: The correct option is B" is wrong.
    """

    name = "mmlu_redux"
    title = "MMLU-Redux"
    source = "https://huggingface.co/datasets/edinburgh-dawg/mmlu-redux-2.0"
    figures = ("accuracy",)

    def load(self, path: str) -> list[Item]:
        """See `Benchmark.load`."""
        return read_items(self, path, ("question", "choices", "answer", "error_type", "correct_answer"), _parse)

    def score(self, item: Item, response: str, answers: Sequence[str]) -> Score:
        """See `Benchmark.score`."""
        letter = _first_capital(response) if self.scoring == "authors" else _letter_alone(response)
        return Score(100.0 * (letter == item.data["answer"]))


def _parse(index: int, cells: Cells) -> Item | None:
    choices, error, key = json_cell(cells, "choices", list), cells["error_type"], str(cells["answer"])
    if len(choices) != len(LETTERS):
        raise ValueError(f"`choices` has {len(choices)} entries, not {len(LETTERS)}")
    if error == "wrong_groundtruth":
        key = str(cells["correct_answer"])
    if error not in ("ok", "wrong_groundtruth") or not (key.isdecimal() or error == "ok"):
        return None
    if not key.isdecimal() or int(key) >= len(LETTERS):
        raise ValueError(f"the right answer is {key!r}, not a number from 0 to {len(LETTERS) - 1}")
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    prompt = PROMPT.format(question=text_cell(cells, "question"), options=options)
    return Item(str(index), [Message(role="user", content=prompt)], {"answer": LETTERS[int(key)]})


def _letter_alone(response: str) -> str | None:
    found = _LETTER.search(re.split("answer:", response, flags=re.IGNORECASE)[-1])
    return found[0] if found and re.search("answer:", response, re.IGNORECASE) else None


def _first_capital(response: str) -> str | None:
    for mark in ("Answer:", "answer:"):
        if mark in response:
            found = re.search("[A-Z]", response.split(mark)[1])
            return found[0] if found else None
    return None
