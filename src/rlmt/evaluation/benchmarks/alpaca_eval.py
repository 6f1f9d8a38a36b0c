"""AlpacaEval 2: instructions, judged against GPT-4 Turbo (https://arxiv.org/abs/2404.04475)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from rlmt.data.tables import Cells
from rlmt.errors import UserError
from rlmt.evaluation.benchmark import Benchmark, Item, Question, Row, Score
from rlmt.evaluation.benchmarks.common import (
    check_ids,
    existing_file,
    last_json_object,
    read_table_rows,
    read_text,
    response_is_a,
    share_of_formed,
    text_cell,
    truncate_words,
)
from rlmt.evaluation.length_control import authors_win_rate, length_controlled_win_rate
from rlmt.rewards.prompt_text import fill
from rlmt.types import Message

BASELINE_FILE, DIFFICULTY_FILE = "alpaca_eval_gpt4_baseline.json", "instruction_difficulty.csv"
MAX_WORDS = 2000
"""Limit of each text in the question."""
QUESTION = """\
Rank two AI models by their answers to an instruction, as most people would.

The instruction: {instruction}

The answers: {answers}

Answer with a JSON object only, in this form, where the better model has rank 1 and the other one rank 2:

{"output": [{"model": "A or B", "rank": 1}, {"model": "B or A", "rank": 2}]}"""


class AlpacaEval(Benchmark):
    """Win rate and length-controlled win rate against GPT-4 Turbo. The question is in our own words.

    A coin, the same whenever an item is judged, decides which of the two comes first. Each text is cut at 2,000 words.
    The judge names a winner; the official judge gives its probability.

    `ours`: an answer without exactly one winner is left out, and the length control is the official one. Malformed
    output loses at any length, and takes no part in the fit. `authors`: an answer without winner is a loss, and the
    length control is `authors_win_rate`.
    """

    name = "alpaca_eval"
    title = "AlpacaEval 2"
    source = "https://huggingface.co/datasets/tatsu-lab/alpaca_eval"
    figures = ("length_controlled_win_rate", "win_rate")
    chat = True
    judge = "gpt-4o"
    baseline = "gpt4_1106_preview"

    def load(self, path: str) -> list[Item]:
        """Reads a folder with the baseline's answers and the difficulty of each instruction.

        Args:
            path: Folder with alpaca_eval_gpt4_baseline.json and instruction_difficulty.csv. `authors` does without the
                second; items without difficulty cannot be scored under `ours`.

        Raises:
            UserError: A file is missing or invalid.
        """
        file = str(existing_file(path, BASELINE_FILE, self))
        rows = read_table_rows(self, file, ("instruction", "output"), _parse)
        known = self.scoring == "ours" or (Path(path).expanduser() / DIFFICULTY_FILE).exists()
        difficulty: Sequence[float | None] = self._difficulty(path, len(rows)) if known else [None] * len(rows)
        items = [
            Item(str(index), messages, {"reference": reference, "difficulty": difficulty[index]})
            for index, (messages, reference) in enumerate(rows)
        ]
        check_ids(file, items)
        return items

    def check(self, items: Sequence[Item] = ()) -> None:
        """See `Benchmark.check`: items that were loaded under `authors` can lack what `ours` needs."""
        known = [item.data["difficulty"] for item in items]
        if self.scoring == "ours" and known and (None in known or not any(known)):
            raise UserError(
                f"--scoring ours: the items of {self.name} have no difficulty; run --generate_only --scoring ours with "
                f"--data.{self.name} FOLDER, which has {DIFFICULTY_FILE}; completions are kept."
            )

    def questions(self, item: Item, response: str) -> list[Question]:
        """See `Benchmark.questions`."""
        texts = (response, item.data["reference"])
        shown = [truncate_words(text, MAX_WORDS) for text in (texts if response_is_a(self, item) else texts[::-1])]
        answers = [{"model": name, "answer": text} for name, text in zip("AB", shown, strict=True)]
        instruction = truncate_words(item.messages[-1]["content"], MAX_WORDS)
        values = {"instruction": instruction, "answers": answers}
        content = fill(QUESTION, {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()})
        return [Question([Message(role="user", content=content)], max_tokens=128)]

    def score(self, item: Item, response: str, answers: Sequence[str]) -> Score:
        """See `Benchmark.score`."""
        winners = _winners(answers[0])
        if not winners or (len(winners) > 1 and self.scoring == "ours"):
            return Score(self.failure, parsed=False)
        return Score(100.0 * ((winners[0] == "A") == response_is_a(self, item)))

    def compute(self, rows: Sequence[Row]) -> dict[str, float]:
        """See `Benchmark.compute`."""
        counted = self.counted(rows)
        controlled = (
            _authors_control(counted) if self.scoring == "authors" else share_of_formed(counted, _official_control)
        )
        return {"length_controlled_win_rate": 100 * controlled, "win_rate": self.mean(rows)}

    def _difficulty(self, folder: str, count: int) -> list[float]:
        """The difficulty of each instruction: lines of row number and value after a header."""
        lines = [line.split(",") for line in read_text(folder, DIFFICULTY_FILE, self).split("\n")[1:] if line.strip()]
        try:
            values = {int(number): float(value) for number, value in lines}
            return [values[number] for number in range(count)]
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{folder}/{DIFFICULTY_FILE} has no number for each of {count} instructions; download it again from "
                f"{self.source}."
            ) from error


def _parse(index: int, cells: Cells) -> tuple[list[Message], str]:
    return [Message(role="user", content=text_cell(cells, "instruction"))], text_cell(cells, "output")


def _winners(answer: str) -> list[str]:
    """The models of rank 1, A or B, in the judge's order."""
    output = (last_json_object(answer) or {}).get("output")
    entries = [entry for entry in output if isinstance(entry, dict)] if isinstance(output, list) else []
    return [str(e.get("model")) for e in entries if str(e.get("rank")) == "1" and e.get("model") in ("A", "B")]


def _official_control(rows: Sequence[Row]) -> float:
    return length_controlled_win_rate(
        [row.score.value / 100 for row in rows],
        [len(row.response) - len(row.item.data["reference"]) for row in rows],
        [row.item.data["difficulty"] for row in rows],
    )


def _authors_control(rows: Sequence[Row]) -> float:
    return authors_win_rate(
        [row.score.value / 100 for row in rows],
        [_words(row.response) - _words(row.item.data["reference"]) for row in rows],
    )


@lru_cache(maxsize=100_000)
def _words(text: str) -> int:
    return len(text.split())
