"""WildBench: hard conversations of real users, judged against GPT-4 (https://arxiv.org/abs/2406.04770)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlmt.data.messages import check_turns, text_problem, to_conversation
from rlmt.data.tables import Cells
from rlmt.evaluation.benchmark import Benchmark, Item, Question, Score
from rlmt.evaluation.benchmarks.common import json_cell, read_items, response_is_a, truncate_words
from rlmt.rewards.prompt_text import fill
from rlmt.types import Message

MAX_WORDS = 2000
"""Limit of each text in the question."""
POINTS = {"A++": 100.0, "A+": 50.0, "A=B": 0.0, "B+": -50.0, "B++": -100.0}
"""Points of response A by verdict."""
QUESTION = """\
Compare two responses of AI assistants to the last message of a user. Read the conversation, then judge both responses.

<history>
{history}
</history>

<query>
{query}
</query>

<response_a>
{response_a}
</response_a>

<response_b>
{response_b}
</response_b>

<checklist>
{checklist}
</checklist>

Let the checklist guide you, but consider whatever else matters. Your verdict is one of

- A++: response A is much better
- A+: response A is slightly better
- A=B: both are equally good; use it sparingly
- B+: response B is slightly better
- B++: response B is much better

Answer with a JSON object only, in this form:

{"analysis of A": "...", "analysis of B": "...", "reason of A=B": "...", "reason of A>B": "...", \
"reason of B>A": "...", "choice": "A++, A+, A=B, B+ or B++"}"""
_CHOICE = re.compile(r'"choice"\s*:\s*"([^"]*)"')


class WildBench(Benchmark):
    """-100 to 100: by how much a judge prefers the response to GPT-4's. The question is in our own words.

    A coin, the same whenever an item is judged, decides which of the two comes first. Each text is cut at 2,000 words.

    `ours`: a verdict is read in upper or lower case, with spaces, and left out if it is none of the five. `authors`:
    such a verdict is -100, and the user's last message is not cut.
    """

    name = "wildbench"
    title = "WildBench"
    source = "allenai/WildBench"
    figures = ("reward",)
    chat = True
    judge = "gpt-4o"
    baseline = "gpt-4"
    failure = -100.0

    def load(self, path: str) -> list[Item]:
        """See `Benchmark.load`."""
        return read_items(self, path, ("conversation_input", "checklist", "references"), self._parse, subset="v2")

    def questions(self, item: Item, response: str) -> list[Question]:
        """See `Benchmark.questions`."""
        texts = (response, item.data["reference"])
        first, second = texts if response_is_a(self, item) else texts[::-1]
        *history, query = item.messages
        shown = query["content"] if self.scoring == "authors" else truncate_words(query["content"], MAX_WORDS)
        values = {
            "history": "\n\n".join(f"{turn['role'].upper()}: {turn['content']}" for turn in history),
            "response_a": first,
            "response_b": second,
        }
        values = {name: truncate_words(text, MAX_WORDS) for name, text in values.items()}
        checklist = "\n".join(f"- {point}" for point in item.data["checklist"])
        content = fill(QUESTION, values | {"query": shown, "checklist": checklist})
        return [Question([Message(role="user", content=content)], max_tokens=1024)]

    def score(self, item: Item, response: str, answers: Sequence[str]) -> Score:
        """See `Benchmark.score`."""
        found = _CHOICE.findall(answers[0])
        if self.scoring == "authors":
            choice = found[0] if found else ""
        else:
            choice = found[-1].replace(" ", "").upper() if found else ""
        if choice not in POINTS:
            return Score(self.failure, parsed=False)
        return Score(POINTS[choice] if response_is_a(self, item) else -POINTS[choice])

    def _parse(self, index: int, cells: Cells) -> Item:
        messages = to_conversation(json_cell(cells, "conversation_input", list))
        check_turns(messages)
        if messages[-1]["role"] != "user":
            raise ValueError("`conversation_input` does not end with a user turn")
        reference = json_cell(cells, "references", dict).get(self.baseline)
        reference = reference[0] if isinstance(reference, list) and reference else reference
        if problem := text_problem(reference):
            raise ValueError(f"the reference of {self.baseline} {problem}")
        checklist = json_cell(cells, "checklist", list)
        return Item(str(index), messages, {"reference": reference, "checklist": checklist})
