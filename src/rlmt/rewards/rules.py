"""Rewards without a model: cheap checks to combine in a `WeightedSum`, or to train on alone in tests."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import numbers
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlmt.errors import UserError, describe_own_error, excerpt, first_line
from rlmt.options import NonNegativeInt, PositiveInt, check_ranges
from rlmt.progress import track
from rlmt.rewards.base import Reward
from rlmt.types import Message, Prompt, Status


class FormatReward(Reward):
    """1 for a well-formed completion, 0 for a malformed one.

    It is only informative if malformed samples are scored (modes `null` and `score_all`). In mode `penalty` they never
    reach a reward, and this one is always 1.

    Args:
        name: Name under which the scores are logged.
    """

    def __init__(self, name: str = "format") -> None:
        super().__init__()
        self.name = name

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """See `Reward.score`."""
        return torch.tensor([float(status is Status.OK) for status in statuses], dtype=torch.float32)


class LengthWindow(Reward):
    """1 for a response of `min_chars` to `max_chars` characters, decreasing linearly outside.

    Let n be the number of characters without surrounding white space, and d = max(min_chars - n, n - max_chars, 0) the
    distance to the window. The score is max(0, 1 - d / margin). The length is in characters, not words, because some
    languages do not separate words by spaces; and not tokens, because tokens depend on a tokenizer.

    Args:
        min_chars: Minimum length with full score.
        max_chars: Maximum length with full score.
        margin: Distance from the window, in characters, at which the score is 0.
        name: Name under which the scores are logged.
    """

    def __init__(
        self, min_chars: NonNegativeInt, max_chars: NonNegativeInt, margin: PositiveInt, name: str = "length_window"
    ) -> None:
        check_ranges(LengthWindow, locals())
        super().__init__()
        self.min_chars = min_chars
        self.max_chars = max_chars
        self.margin = margin
        self.name = name

    def check(self) -> None:
        """Raises UserError for an empty window."""
        if self.min_chars > self.max_chars:
            raise UserError(
                f"reward {self.name!r}: min_chars {self.min_chars} is above max_chars {self.max_chars}; lower it."
            )

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """See `Reward.score`."""
        lengths = [len(response.strip()) for response in responses]
        distances = [max(self.min_chars - n, n - self.max_chars, 0) for n in lengths]
        return torch.tensor([max(0.0, 1 - d / self.margin) for d in distances], dtype=torch.float32)


class RegexReward(Reward):
    """1 if a regular expression matches anywhere in the response, else 0.

    Args:
        pattern: Regular expression of Python's `re`. Flags are inline: `(?i)` ignores case, `(?s)` lets `.` match line
            ends.
        name: Name under which the scores are logged.
    """

    def __init__(self, pattern: str, name: str = "regex") -> None:
        super().__init__()
        self.pattern = pattern
        self.name = name

    def check(self) -> None:
        """Raises UserError for an invalid expression."""
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(
                f"reward {self.name!r}: pattern {self.pattern!r} is not a regular expression ({error}); fix it."
            ) from error

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """See `Reward.score`."""
        pattern = re.compile(self.pattern)
        return torch.tensor([float(pattern.search(text) is not None) for text in responses], dtype=torch.float32)


class CallableReward(Reward):
    """Scores with a user-defined function: `def fn(prompt: list[Message], response: str) -> float`.

    A function with a parameter named `extra` also receives the other columns of the prompt's row, as a dictionary by
    column name (see `--data.extra_columns`).

    Args:
        function: Import path, such as `my_rewards.politeness`, of a file in the working folder or on PYTHONPATH.
        name: Name under which the scores are logged; None uses the function's name.
    """

    def __init__(self, function: str, name: str | None = None) -> None:
        super().__init__()
        self.function = function
        self.name = name or function.rpartition(".")[2]

    def check(self) -> None:
        """Raises UserError if the function cannot be imported or is not callable."""
        self._import()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """See `Reward.score`.

        Raises:
            UserError: The function did not return a finite number.
        """
        function = self._import()
        takes_extra = _takes_extra(function)
        scores = []
        for prompt, response in track("scoring", list(zip(prompts, responses, strict=True))):
            messages = [Message(role=m["role"], content=m["content"]) for m in prompt.messages]
            extra = {"extra": copy.deepcopy(prompt.extra)} if takes_extra else {}
            try:
                value = function(messages, response, **extra)
            except Exception as error:
                what = describe_own_error(error) or f"{type(error).__name__}: {first_line(error)}"
                raise UserError(
                    f"reward function {self.function} raised {what} for the response {excerpt(response)}; fix it, and "
                    f"{self.resume}."
                ) from error
            if not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise UserError(
                    f"reward function {self.function} returned {excerpt(value)} for the response "
                    f"{excerpt(response)}; it must return a finite number."
                )
            scores.append(float(value))
        return torch.tensor(scores, dtype=torch.float32)

    def _import(self) -> Callable[..., object]:
        path, _, attribute = self.function.rpartition(".")
        if not path:
            raise UserError(f"reward function {self.function!r} is not an import path; use module.function.")
        try:
            function = getattr(importlib.import_module(path), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"reward function {self.function!r} cannot be imported ({error}); put its file into the "
                "working folder or on PYTHONPATH, and check the spelling."
            ) from error
        if not callable(function):
            raise UserError(f"reward function {self.function!r} is a {type(function).__name__}; use a function.")
        return function  # type: ignore[no-any-return]


def _takes_extra(function: Callable[..., object]) -> bool:
    """Whether a function has a parameter named `extra`; built-in functions may have no signature."""
    try:
        return "extra" in inspect.signature(function).parameters
    except ValueError:
        return False
