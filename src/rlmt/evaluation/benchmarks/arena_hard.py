"""Arena-Hard v2: hard prompts of real users, judged against o3-mini (https://arxiv.org/abs/2406.11939)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from rlmt.data.tables import Cells
from rlmt.errors import UserError
from rlmt.evaluation.benchmark import Benchmark, Item, Question, Row, Score
from rlmt.evaluation.benchmarks.common import (
    check_ids,
    existing_file,
    json_cell,
    read_table_rows,
    share_of_formed,
    text_cell,
)
from rlmt.evaluation.length_control import controlled_win_rate, scaled
from rlmt.rewards.prompt_text import fill
from rlmt.types import Message

QUESTION_FILE, ANSWER_FILE = "question.jsonl", "model_answer/o3-mini-2025-01-31.jsonl"
POINTS = {"A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, 3)}
"""Points of answer A by verdict, and how often the verdict counts."""
SYSTEM = """\
You judge which of two assistants answers a user's prompt better. First write your own answer to the prompt. Compare \
both answers with it and name their mistakes. Then consider how helpful, relevant and concise each of them is, and \
what is missing. Where a prompt is ambiguous, it is better to ask than to assume. Neither the order nor the length of \
the answers counts by itself.

After your explanation, end with exactly one of these verdicts:

1. Assistant A is significantly better: [[A>>B]]
2. Assistant A is slightly better: [[A>B]]
3. Both are about equal: [[A=B]]
4. Assistant B is slightly better: [[B>A]]
5. Assistant B is significantly better: [[B>>A]]"""
QUESTION = """\
<prompt>
{prompt}
</prompt>

<assistant_a>
{answer_a}
</assistant_a>

<assistant_b>
{answer_b}
</assistant_b>"""
_VERDICTS = (re.compile(r"\[\[([AB<>=]+)\]\]"), re.compile(r"\[([AB<>=]+)\]"))
_CODE = re.compile(r"```.*?```", re.DOTALL)
_MARKDOWN = (
    re.compile(r"^#{1,6}\s", re.MULTILINE),
    re.compile(r"^\s*(?:[-*+]|\d+\.)\s", re.MULTILINE),
    re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
)
"""Headers, list items and bold text."""


class ArenaHard(Benchmark):
    """Win rate against o3-mini, in both orders, with and without control of style. The question is in our own words.

    `ours`: a clear verdict counts three times, as in the official score, and a row without two verdicts is left out.
    `authors`: every verdict counts once, and a missing one is a tie. The authors do not control style; the figure is
    computed from their points.
    """

    name = "arena_hard"
    title = "Arena-Hard v2"
    source = "https://huggingface.co/datasets/lmarena-ai/arena-hard-auto/tree/main/data/arena-hard-v2.0"
    figures = ("win_rate", "style_controlled_win_rate")
    chat = True
    judge = "gpt-4.1-mini"
    baseline = "o3-mini"
    failure_weight = 3.0

    def load(self, path: str) -> list[Item]:
        """Reads the hard prompts of a folder, with the baseline's answers.

        Args:
            path: Folder with question.jsonl and model_answer/o3-mini-2025-01-31.jsonl.

        Raises:
            UserError: A file is missing or invalid, or a prompt has no answer.
        """
        questions, answers = (str(existing_file(path, name, self)) for name in (QUESTION_FILE, ANSWER_FILE))
        references = dict(read_table_rows(self, answers, ("uid", "messages"), _parse_answer))
        rows = read_table_rows(self, questions, ("uid", "category", "prompt"), _parse_question)
        items = [
            Item(uid, [Message(role="user", content=prompt)], {"reference": references.get(uid)})
            for uid, category, prompt in rows
            if category == "hard_prompt"
        ]
        if missing := [item.id for item in items if item.data["reference"] is None]:
            raise UserError(
                f"{answers} has no answer to {len(missing)} prompts, such as {missing[0]}; download it again."
            )
        check_ids(questions, items)
        return items

    def questions(self, item: Item, response: str) -> list[Question]:
        """One question with the response as A, and one with the response as B."""
        texts = (response, item.data["reference"])
        questions = []
        for first, second in (texts, texts[::-1]):
            values = {"prompt": item.messages[-1]["content"], "answer_a": first, "answer_b": second}
            turns = (("system", SYSTEM), ("user", fill(QUESTION, values)))
            messages = [Message(role=role, content=content) for role, content in turns]
            questions.append(Question(messages, max_tokens=3072))
        return questions

    def score(self, item: Item, response: str, answers: Sequence[str]) -> Score:
        """See `Benchmark.score`."""
        verdicts = [_verdict(answer) for answer in answers]
        parsed = None not in verdicts
        if not parsed and self.scoring == "ours":
            return Score(self.failure, parsed=False)
        (one, count), (other, other_count) = (POINTS[verdict or "A=B"] for verdict in verdicts)
        if self.scoring == "authors":
            count = other_count = 1
        total = count + other_count
        return Score(100 * (count * one + other_count * (1 - other)) / total, parsed, weight=total / 2)

    def compute(self, rows: Sequence[Row]) -> dict[str, float]:
        """See `Benchmark.compute`."""
        controlled = share_of_formed(self.counted(rows), _style_controlled)
        return {"win_rate": self.mean(rows), "style_controlled_win_rate": 100 * controlled}


def _parse_question(index: int, cells: Cells) -> tuple[str, object, str]:
    return text_cell(cells, "uid"), cells["category"], text_cell(cells, "prompt")


def _parse_answer(index: int, cells: Cells) -> tuple[str, str]:
    messages = json_cell(cells, "messages", list)
    content = messages[-1].get("content") if messages and isinstance(messages[-1], dict) else None
    return text_cell(cells, "uid"), text_cell(content if isinstance(content, dict) else {"answer": content}, "answer")


def _verdict(answer: str) -> str | None:
    """The last verdict of a judge's answer, in two brackets or else in one; None if it is none of the five."""
    found = next((matches for pattern in _VERDICTS if (matches := pattern.findall(answer.upper()))), [""])
    return found[-1] if found[-1] in POINTS else None


def _style_controlled(rows: Sequence[Row]) -> float:
    """Win rate, 0 to 1, where two answers have the same style: one logistic regression, as in the official score.

    The properties are divided by their standard deviation, but not centered: the mean of a single model's differences
    is not 0, and it is what has to be controlled.
    """
    differences = np.array([_style_difference(row.response, row.item.data["reference"]) for row in rows])
    columns = [scaled(column) for column in differences.T]
    return controlled_win_rate(
        [row.score.value / 100 for row in rows], columns, weights=[row.score.weight for row in rows]
    )


def _style_difference(response: str, reference: str) -> list[float]:
    """Difference in length, and in headers, list items and bold texts per word, each relative to the sum of both."""
    (length, *marks), (other_length, *other_marks) = _style(response), _style(reference)
    densities = [(a / max(length, 1), b / max(other_length, 1)) for a, b in zip(marks, other_marks, strict=True)]
    relative = (length - other_length) / max(length + other_length, 1)
    return [relative, *((a - b) / (a + b + 1) for a, b in densities)]


@lru_cache(maxsize=100_000)
def _style(text: str) -> tuple[int, ...]:
    """Words, and headers, list items and bold texts outside of code blocks."""
    plain = _CODE.sub("", text)
    return (len(text.split()), *(len(pattern.findall(plain)) for pattern in _MARKDOWN))
