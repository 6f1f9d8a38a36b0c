"""Scores by the checklist that each prompt has in a column: the judge is asked which criteria a response meets."""

from __future__ import annotations

from collections.abc import Sequence

from rlmt.endpoints import Endpoint
from rlmt.evaluation.benchmark import Question
from rlmt.rewards import RubricReward
from rlmt.rewards.rubric import met_share, read_answers
from rlmt.types import Prompt


class Rubric:
    """Asks and scores with the checklists of a column; see `RubricReward` for their form.

    Args:
        judge: The judge.
        column: Column of the prompt set.
        max_tokens: Maximum length of an answer in tokens.
    """

    def __init__(self, judge: Endpoint, column: str, max_tokens: int) -> None:
        self._reward = RubricReward(judge, None, column=column, max_tokens=max_tokens, name=column)

    def ask(self, prompt: Prompt, response: str) -> Question:
        """The question about a response.

        Raises:
            UserError: The prompt's checklist is invalid.
        """
        (call,) = self._reward.first_calls([prompt], [response])
        return Question(call.body["messages"], self._reward.max_tokens)

    def readable(self, prompt: Prompt, answer: str) -> bool:
        """Whether an answer has a verdict on every criterion."""
        return read_answers(answer, len(self._reward.criteria(prompt))) is not None

    def score(self, prompt: Prompt, answers: Sequence[str]) -> list[float]:
        """The weighted share of criteria that each response met, nan for an answer that cannot be read."""
        criteria = self._reward.criteria(prompt)
        verdicts = [read_answers(answer, len(criteria)) for answer in answers]
        return [float("nan") if met is None else met_share(criteria, met) for met in verdicts]
