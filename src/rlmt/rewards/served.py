"""A reward model behind vLLM's pooling server, so that it takes no memory of the trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rlmt.endpoints import Call, Endpoint
from rlmt.errors import UserError
from rlmt.options import PositiveInt, check_ranges
from rlmt.rewards.asked import AskedReward
from rlmt.rewards.classifier import ClassifierReward
from rlmt.types import Prompt, Status

PROBES = ("No.", "Yes, of course: here is the plan.", "abc abc abc abc abc abc abc abc abc abc")
"""Responses whose scores at start show whether the server returns logits."""


class ServedReward(AskedReward):
    """Scores with a sequence classifier that `vllm serve --runner pooling` serves.

    The scores are those of `ClassifierReward`: the conversation is rendered, tokenized and truncated here, by the same
    code, and the server receives token ids. It is asked for logits; its default is a sigmoid of them, and versions that
    do not know the option ignore it, so that the start of a run compares both.

    Args:
        model: Folder or Hub name of the reward model, for its tokenizer, chat template and context length.
        endpoints: The servers; `base_url` is without path, such as http://127.0.0.1:8000. `model` is the name that the
            server gives the model; empty sends none.
        max_length: Maximum input in tokens; None uses the model's context. Must not exceed the server's
            `--max-model-len`.
        truncation_side: Side on which longer input is truncated.
        batch_size: Responses per request.
        ledger: File that keeps every answer, so that a resumed run gets the same scores to the last bit; None keeps
            none.
        name: Name under which the scores are logged.

    Raises:
        UserError: An argument is out of range.

    Example:
        In a configuration::

            class_path: rlmt.rewards.ServedReward
            init_args:
              model: Skywork/Skywork-Reward-Llama-3.1-8B-v0.2
              endpoints: [{base_url: "http://127.0.0.1:8000"}]
    """

    def __init__(
        self,
        model: str,
        endpoints: list[Endpoint],
        max_length: PositiveInt | None = None,
        truncation_side: Literal["left", "right"] = "left",
        batch_size: PositiveInt = 32,
        ledger: str | None = None,
        name: str = "reward_model",
    ) -> None:
        check_ranges(ServedReward, locals())
        super().__init__(endpoints, ledger, name)
        self.source = model
        self.batch_size = batch_size
        # Its weights are never loaded. In a tuple, since a submodule would count as a reward model of this process.
        self._classifier = (
            ClassifierReward(model, max_length=max_length, truncation_side=truncation_side, tokens_per_batch=2**31),
        )

    def check(self) -> None:
        """Checks endpoints, and reads the model's configuration and tokenizer; see `ClassifierReward.check`."""
        super().check()
        self._classifier[0].check()

    def load(self) -> None:
        """Opens the ledger, and checks that every server returns logits.

        Raises:
            UserError: A server is lost, or does not return logits.
        """
        super().load()
        prompts = [Prompt(0, [{"role": "user", "content": "Can you help me plan a day?"}])] * len(PROBES)
        rows = self._classifier[0].encode(prompts, PROBES)
        for endpoint, client in zip(self.endpoints, self._clients, strict=True):
            both = (self._call(rows, False), self._call(rows, True))
            logits, probabilities = (self._read(answer, len(rows)) for answer in client.submit(both).result())
            expected = [1 / (1 + math.exp(-max(-60.0, min(60.0, logit)))) for logit in logits]
            gaps = [abs(e - p) for e, p in zip(expected, probabilities, strict=True)]
            if max(gaps) > 0.02 or logits == probabilities:
                self.close()
                raise UserError(
                    f"reward {self.name!r}: {endpoint.base_url} does not return logits when asked with use_activation "
                    "false; serve the model with a current vLLM and `--runner pooling`."
                )

    def first_calls(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Call]:
        """One request per `batch_size` responses."""
        rows = self._classifier[0].encode(prompts, responses)
        return [self._call(rows[i : i + self.batch_size], False) for i in range(0, len(rows), self.batch_size)]

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """See `Reward.score`; the status is ignored.

        Raises:
            UserError: A server is lost, refuses a request, or answers something else than scores.
        """
        calls = self.first_calls(prompts, responses)
        answers = zip(calls, self.answers(calls), strict=True)
        scores = [score for call, answer in answers for score in self._read(answer, len(call.body["input"]))]
        return torch.tensor(scores, dtype=torch.float32)

    def _call(self, rows: Sequence[list[int]], activation: bool) -> Call:
        model = self.endpoints[0].model
        body = {"input": list(rows), "use_activation": activation} | ({"model": model} if model else {})
        return Call("/classify", body)

    def _read(self, answer: dict[str, Any], count: int) -> list[float]:
        """The scores in an answer, in the order of the request."""
        try:
            items = sorted(answer["data"], key=lambda item: int(item["index"]))
            scores = [float(score) for item in items for score in item["probs"]]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"reward {self.name!r}: the answer of /classify has no scores; check that endpoints are vLLM servers "
                "with `--runner pooling`."
            ) from error
        if len(scores) != count or len(items) != count:
            raise UserError(
                f"reward {self.name!r}: /classify answered {len(scores)} scores for {count} responses; serve a "
                "classifier with one label."
            )
        return scores
