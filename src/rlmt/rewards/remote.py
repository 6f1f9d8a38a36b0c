"""A reward that a service of the user computes, in OpenRLHF's request and response form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlmt.endpoints import Call, Endpoint
from rlmt.errors import UserError
from rlmt.options import PositiveInt, check_ranges
from rlmt.rewards.asked import AskedReward
from rlmt.rewards.prompt_text import conversation_text
from rlmt.types import Prompt, Status


class RemoteReward(AskedReward):
    """Scores with an HTTP service of the user: one JSON object with lists of equal length in, a list of scores out.

    The request has `prompts` (the conversation as text), `responses` (without thoughts), `query` (each prompt followed
    by its response, as services for OpenRLHF expect), `messages` (the conversation as a list of turns) and `labels`
    (the prompts' column `label_column`). The answer is `{"rewards": [...]}`; other fields are ignored.

    Args:
        endpoint: The service; `base_url` is its whole URL, such as http://127.0.0.1:5000/get_reward.
        batch_size: Responses per request.
        label_column: Column of the prompt set to send as `labels`, one of `--data.extra_columns`; None sends null.
        ledger: File that keeps every answer, for a service whose answers differ from time to time; None keeps none.
        name: Name under which the scores are logged.

    Raises:
        UserError: An argument is out of range.

    Example:
        In a configuration::

            class_path: rlmt.rewards.RemoteReward
            init_args:
              endpoint: {base_url: "http://127.0.0.1:5000/get_reward"}
              label_column: answer
    """

    def __init__(
        self,
        endpoint: Endpoint,
        batch_size: PositiveInt = 64,
        label_column: str | None = None,
        ledger: str | None = None,
        name: str = "remote",
    ) -> None:
        check_ranges(RemoteReward, locals())
        super().__init__([endpoint], ledger, name)
        self.batch_size = batch_size
        self.label_column = label_column

    @property
    def columns(self) -> set[str]:
        """The column of the labels."""
        return {self.label_column} if self.label_column is not None else set()

    def first_calls(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Call]:
        """One request per `batch_size` responses."""
        rows = list(zip(prompts, responses, strict=True))
        return [self._call(rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """See `Reward.score`; the status is ignored.

        Raises:
            UserError: The service is lost, refuses a request, or answers something else than a score per response.
        """
        calls = self.first_calls(prompts, responses)
        answers = zip(calls, self.answers(calls), strict=True)
        scores = [score for call, answer in answers for score in self._read(answer, len(call.body["responses"]))]
        return torch.tensor(scores, dtype=torch.float32)

    def _call(self, rows: Sequence[tuple[Prompt, str]]) -> Call:
        texts = [conversation_text(prompt.messages) for prompt, _ in rows]
        return Call(
            "",
            {
                "query": [text + response for text, (_, response) in zip(texts, rows, strict=True)],
                "prompts": texts,
                "responses": [response for _, response in rows],
                "messages": [prompt.messages for prompt, _ in rows],
                "labels": [prompt.extra[self.label_column] if self.label_column else None for prompt, _ in rows],
            },
        )

    def _read(self, answer: dict[str, Any], count: int) -> list[float]:
        rewards = answer.get("rewards")
        if not isinstance(rewards, list) or len(rewards) != count:
            found = f"{len(rewards)} rewards" if isinstance(rewards, list) else "no list `rewards`"
            raise UserError(
                f"reward {self.name!r}: {self.endpoints[0].base_url} answered {found} for {count} responses; it must "
                'answer {"rewards": [one number per response]}.'
            )
        if bad := [value for value in rewards if isinstance(value, bool) or not isinstance(value, int | float)]:
            raise UserError(
                f"reward {self.name!r}: {self.endpoints[0].base_url} answered the reward {str(bad[0])[:80]!r}; it must "
                "be a number."
            )
        return [float(value) for value in rewards]
