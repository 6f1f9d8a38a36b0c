"""Two small benchmarks: one by a rule, one by a judge who compares with a baseline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlmt.evaluation.benchmark import Benchmark, Item, Question, Score

PROMPTS = ["Hi", "Tell me about the sun.", "Why?", "Count: one two three", "A poem", "Say cat", "Red or blue?", "Moon"]


class _Toy(Benchmark):
    def load(self, path: str) -> list[Item]:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        return [
            Item(f"{i}", [{"role": "user", "content": row["prompt"]}], {"answer": row["answer"]}, f"g{i // 2}")
            for i, row in enumerate(rows)
        ]


class Letters(_Toy):
    """100 for a response with the letter in the item's `answer`; `authors` asks for it at the start."""

    name, title, source, figures = "letters", "Letters", "https://example.org/letters", ("accuracy",)

    def score(self, item: Item, response: str, answers: Sequence[str]) -> Score:
        found = item.data["answer"] in response if self.scoring == "ours" else response[:1] == item.data["answer"]
        return Score(100.0 * found)


class Duel(_Toy):
    """100 if the judge answers `win`, 50 for `tie`, 0 for `loss`, against a baseline."""

    name, title, source, figures = "duel", "Duel", "https://example.org/duel", ("win_rate", "wins")
    chat, judge, baseline = True, "paper-judge", "reference"

    def questions(self, item: Item, response: str) -> list[Question]:
        text = f"Prompt: {item.messages[-1]['content']}\nA: {item.data['answer']}\nB: {response}"
        return [Question([{"role": "user", "content": text}], 8)]

    def score(self, item: Item, response: str, answers: Sequence[str]) -> Score:
        values = {"win": 100.0, "tie": 50.0, "loss": 0.0}
        return Score(values[answers[0]]) if answers[0] in values else Score(50.0, parsed=False)

    def compute(self, rows: Sequence[Any]) -> dict[str, float]:
        return {"win_rate": self.mean(rows), "wins": 100 * sum(row.score.value == 100 for row in rows) / len(rows)}


def write_data(path: Path, letter: str = "e") -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": letter}) + "\n" for prompt in PROMPTS))
    return path
