"""ZebraLogic: logic grid puzzles (https://arxiv.org/abs/2502.01100)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rlmt.data.tables import Cells
from rlmt.evaluation.benchmark import Benchmark, Item, Score
from rlmt.evaluation.benchmarks.common import json_cell, last_json_object, read_items, text_cell
from rlmt.rewards.prompt_text import fill
from rlmt.types import Message

PROMPT = """\
Here is an example of a puzzle and its answer.

There are 2 houses, numbered 1 to 2 from left to right, as seen from across the street. Each house is occupied by a \
different person. Each house has a unique attribute for each of the following characteristics:
 - Each person has a unique name: `Alice`, `Eric`
 - Each person has a favorite drink: `tea`, `milk`

## Clues:
1. Eric is somewhere to the right of the person who drinks tea.

{
    "reasoning": "By clue 1, Eric is not in the first house, so he is in house 2 and Alice in house 1. The person who \
drinks tea is left of Eric, so Alice drinks tea. Milk remains for Eric.",
    "solution": {
        "House 1": {
            "Name": "Alice",
            "Drink": "tea"
        },
        "House 2": {
            "Name": "Eric",
            "Drink": "milk"
        }
    }
}

# The puzzle to solve

{puzzle}

# Instruction

Solve the puzzle above. Write your reasoning and the solution as JSON in this form:

{form}
"""


class ZebraLogic(Benchmark):
    """100 if every cell of the grid in the response's last JSON object is right, in upper or lower case.

    The rule is the same under `ours` and `authors`. The example in the prompt is our own.
    """

    name = "zebra_logic"
    title = "ZebraLogic"
    source = "https://huggingface.co/datasets/allenai/ZebraLogicBench-private"
    figures = ("accuracy",)

    def load(self, path: str) -> list[Item]:
        """See `Benchmark.load`."""
        return read_items(self, path, ("id", "puzzle", "solution"), _parse)

    def score(self, item: Item, response: str, answers: Sequence[str]) -> Score:
        """See `Benchmark.score`."""
        answer = last_json_object(response)
        return Score(100.0 * (answer is not None and _equal(item.data["solution"], answer.get("solution"))))


def _parse(index: int, cells: Cells) -> Item:
    puzzle, solution = text_cell(cells, "puzzle"), json_cell(cells, "solution", dict)
    header, rows = solution.get("header"), solution.get("rows")
    if not isinstance(header, list) or not isinstance(rows, list) or header[:1] != ["House"] or not rows:
        raise ValueError("`solution` has no `header` that starts with House and no `rows`")
    grid = {f"House {n}": dict(zip(header[1:], row[1:], strict=True)) for n, row in enumerate(rows, start=1)}
    empty = {house: dict.fromkeys(cells, "___") for house, cells in grid.items()}
    form = json.dumps({"reasoning": "___", "solution": empty}, indent=4)
    prompt = fill(PROMPT, {"puzzle": puzzle, "form": form})
    return Item(str(cells["id"]), [Message(role="user", content=prompt)], {"solution": grid})


def _equal(solution: dict[str, dict[str, str]], answer: Any) -> bool:
    """Whether an answer has every cell of the solution; of a list the first entry counts."""
    return isinstance(answer, dict) and all(
        isinstance(answer.get(house), dict) and _text(answer[house].get(column)) == _text(cell)
        for house, row in solution.items()
        for column, cell in row.items()
    )


def _text(cell: Any) -> str | None:
    first = cell[0] if isinstance(cell, list) and cell else cell
    return first.strip().lower() if isinstance(first, str) else None
