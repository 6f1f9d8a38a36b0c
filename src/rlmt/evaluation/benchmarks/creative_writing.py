"""Creative Writing v3: stories, rated by a judge on 22 criteria (https://github.com/EQ-bench/creative-writing-bench)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from rlmt.errors import UserError, first_line
from rlmt.evaluation.benchmark import Benchmark, Item, Question, Score
from rlmt.evaluation.benchmarks.common import check_ids, read_text
from rlmt.rewards.prompt_text import fill
from rlmt.types import Message

PROMPT_FILE, CRITERIA_FILE, NEGATIVE_FILE = (
    "creative_writing_prompts_v3.json", "creative_writing_criteria.txt", "negative_criteria.txt"
)  # fmt: skip
ITERATIONS = 3
"""Number of items per prompt, each with a seed modifier of its own."""
MAX_SCORE = 20
MAX_WORDS = 3200
"""Limit of a story in the question."""
QUESTION = """\
You are a strict critic of creative writing. Rate the story below, which a model wrote for the prompt.

<prompt>
{prompt}
</prompt>

<story>
{story}
</story>

First analyze the story, and do not spare its failings. Ignore comments of the model on its own story. Then rate it by \
each of these criteria, from 0 to 20, where 20 is a masterpiece:

{criteria}

For these criteria, lower is better: {negative}

Leave out a criterion that does not apply. Use no markdown, write the names exactly as above, and answer in this form:

[Analysis]
Your analysis.

[Scores]
Name of the first criterion: score
Name of the second criterion: score"""
_NUMBER = r"\[?(?:Score\s+)?(-?\d+(?:\.\d+)?)"
_ANY_SCORE = re.compile(r"(.*?):\s*(?:Score\s+)?(-?\d+(?:\.\d+)?)"), re.compile(r"(.*?):\s*\[(-?\d+(?:\.\d+)?)\]")


class CreativeWriting(Benchmark):
    """0 to 100: five times the mean score of a story, lower-is-better criteria inverted.

    The question is in our own words. A story is cut at 3,200 words. The three items of a prompt are resampled together.

    `ours`: the scores are those of named criteria after the line [Scores]; a verdict with less than half of them is
    left out. `authors`: any "text: number" of the answer is a score, and the judge sees the prompt with its placeholder
    <SEED> instead of the modifier that the policy saw.
    """

    name = "creative_writing"
    title = "Creative Writing v3"
    source = "https://github.com/EQ-bench/creative-writing-bench/tree/main/data"
    figures = ("score",)
    judge = "gpt-4.1"

    def load(self, path: str) -> list[Item]:
        """Reads a folder with the prompts and the criteria.

        Args:
            path: Folder with creative_writing_prompts_v3.json, creative_writing_criteria.txt and negative_criteria.txt.

        Raises:
            UserError: A file is missing or invalid.
        """
        criteria, negative = (
            [line.strip() for line in read_text(path, name, self).split("\n") if line.strip()]
            for name in (CRITERIA_FILE, NEGATIVE_FILE)
        )
        if unknown := set(negative) - set(criteria):
            raise UserError(f"{path}/{NEGATIVE_FILE}: {min(unknown)!r} is not in {CRITERIA_FILE}; download both again.")
        try:
            prompts: Any = json.loads(read_text(path, PROMPT_FILE, self))
            items = [
                _item(key, number, prompt["writing_prompt"], prompt["seed_modifiers"], criteria, negative)
                for key, prompt in prompts.items()
                for number in range(ITERATIONS)
            ]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise UserError(
                f"{path}/{PROMPT_FILE} is not an object of prompts with `writing_prompt` and `seed_modifiers` "
                f"({first_line(error)}); download it again."
            ) from error
        check_ids(path, items)
        return items

    def questions(self, item: Item, response: str) -> list[Question]:
        """See `Benchmark.questions`."""
        values = {
            "prompt": item.data["prompt"] if self.scoring == "authors" else item.messages[-1]["content"],
            "story": _truncate(response),
            "criteria": "\n".join(f"- {name}" for name in item.data["criteria"]),
            "negative": ", ".join(item.data["negative"]),
        }
        return [Question([Message(role="user", content=fill(QUESTION, values))], max_tokens=2048)]

    def score(self, item: Item, response: str, answers: Sequence[str]) -> Score:
        """See `Benchmark.score`."""
        criteria, negative = item.data["criteria"], item.data["negative"]
        scores = _any_scores(answers[0]) if self.scoring == "authors" else _scores(answers[0], criteria)
        if len(scores) < (1 if self.scoring == "authors" else len(criteria) / 2):
            return Score(self.failure, parsed=False)
        values = [MAX_SCORE - value if name in negative else value for name, value in scores.items()]
        values = [value for value in values if value <= MAX_SCORE]
        return Score(100 / MAX_SCORE * sum(values) / len(values))


def _item(key: str, number: int, prompt: str, seeds: list[str], criteria: list[str], negative: list[str]) -> Item:
    """One item of a prompt; the policy sees the prompt with a seed modifier in the place of <SEED>."""
    content = prompt.replace("<SEED>", seeds[number % len(seeds)])
    data = {"prompt": prompt, "criteria": criteria, "negative": negative}
    return Item(f"{key}_{number + 1}", [Message(role="user", content=content)], data, group=key)


def _truncate(story: str) -> str:
    words = list(re.finditer(r"\S+", story))
    return story if len(words) <= MAX_WORDS else story[: words[MAX_WORDS - 1].end()]


def _scores(answer: str, criteria: Sequence[str]) -> dict[str, float]:
    """The scores of named criteria after the last line [Scores], each 0 to 20; the last one of a repeated name."""
    _, mark, part = answer.rpartition("[Scores]")
    names = {name.casefold(): name for name in criteria}
    found = re.findall(rf"^[\s*#-]*([^:\n]+?)[\s*]*:[\s*]*{_NUMBER}", part if mark else "", re.MULTILINE)
    given = {names[name.casefold()]: float(value) for name, value in found if name.casefold() in names}
    return {name: value for name, value in given.items() if 0 <= value <= MAX_SCORE}


def _any_scores(answer: str) -> dict[str, float]:
    """Whatever looks like a score, as the authors' code reads it."""
    found = [match for pattern in _ANY_SCORE for match in pattern.findall(answer)]
    return {name.strip(): float(value) for name, value in found if float(value) <= MAX_SCORE}
