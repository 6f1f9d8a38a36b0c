"""Rewards that need no model: cheap checks to mix into a `WeightedSum`, or to train on alone in tests."""

from __future__ import annotations

import importlib
import math
import numbers
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlmt.errors import UserError
from rlmt.ranges import NonNegativeInt, PositiveInt, check_ranges
from rlmt.rewards.base import Reward
from rlmt.types import Message, Status


class FormatReward(Reward):
    """1 for a well-formed completion, 0 for a malformed one.

    It tells samples apart only where malformed ones are scored at all (`null` and `score_all`); under `penalty` they
    never reach a reward and this one is 1 throughout.

    Args:
        name: Under which the scores are logged.
    """

    def __init__(self, name: str = "format") -> None:
        super().__init__()
        self.name = name

    def score(self, prompts: Sequence[list[Message]], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """See `Reward.score`."""
        return torch.tensor([float(status is Status.OK) for status in statuses], dtype=torch.float32)


class LengthWindow(Reward):
    """1 for a response of `min_chars` to `max_chars` characters, falling off in a straight line outside.

    With n characters, white space around the response not counted, and d = max(min_chars - n, n - max_chars, 0) the
    distance to the window, the score is max(0, 1 - d / margin). Characters rather than words, because not every
    language puts spaces between words; rather than tokens, because those belong to one tokenizer.

    Args:
        min_chars: Shortest length with full score.
        max_chars: Longest length with full score.
        margin: At this distance from the window, in characters, the score reaches 0.
        name: Under which the scores are logged.
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
                f"reward {self.name!r}: min_chars {self.min_chars} and max_chars {self.max_chars} make no window: "
                "set 0 <= min_chars <= max_chars"
            )

    def score(self, prompts: Sequence[list[Message]], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """See `Reward.score`."""
        lengths = [len(response.strip()) for response in responses]
        distances = [max(self.min_chars - n, n - self.max_chars, 0) for n in lengths]
        return torch.tensor([max(0.0, 1 - d / self.margin) for d in distances], dtype=torch.float32)


class RegexReward(Reward):
    """1 where a regular expression is found anywhere in the response, else 0.

    Args:
        pattern: Expression of Python's `re`; flags go inline: `(?i)` ignores case, `(?s)` lets `.` match line ends.
        name: Under which the scores are logged.
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
                f"reward {self.name!r}: pattern {self.pattern!r} is no regular expression ({error}): mend the pattern"
            ) from error

    def score(self, prompts: Sequence[list[Message]], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """See `Reward.score`."""
        pattern = re.compile(self.pattern)
        return torch.tensor([float(pattern.search(text) is not None) for text in responses], dtype=torch.float32)


class CallableReward(Reward):
    """Scores with a function of the user's: `def fn(prompt: list[Message], response: str) -> float`.

    Args:
        function: Import path, such as `my_rewards.politeness`; its folder must be on the import path (PYTHONPATH).
        name: Under which the scores are logged; by default the function's name.
    """

    def __init__(self, function: str, name: str | None = None) -> None:
        super().__init__()
        self.function = function
        self.name = name or function.rpartition(".")[2]

    def check(self) -> None:
        """Raises UserError where the function cannot be imported or is none."""
        self._import()

    def score(self, prompts: Sequence[list[Message]], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        """See `Reward.score`.

        Raises:
            UserError: The function returned something else than a finite number.
        """
        function = self._import()
        scores = []
        for prompt, response in zip(prompts, responses, strict=True):
            try:
                value = function([Message(role=m["role"], content=m["content"]) for m in prompt], response)
            except Exception as error:
                error.add_note(f"in reward function {self.function} for the response {_excerpt(response)}")
                raise
            if not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise UserError(
                    f"reward function {self.function} returned {_excerpt(value)} for the response "
                    f"{_excerpt(response)}: it must return a finite number"
                )
            scores.append(float(value))
        return torch.tensor(scores, dtype=torch.float32)

    def _import(self) -> Callable[[list[Message], str], object]:
        path, _, attribute = self.function.rpartition(".")
        if not path:
            raise UserError(f"reward function {self.function!r} is no import path: write it as module.function")
        try:
            function = getattr(importlib.import_module(path), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"reward function {self.function!r} cannot be imported ({error}): put the folder of its module on "
                "PYTHONPATH and check the spelling"
            ) from error
        if not callable(function):
            raise UserError(f"reward function {self.function!r} is a {type(function).__name__}: name a function")
        return function  # type: ignore[no-any-return]


def _excerpt(value: object) -> str:
    """`value` as Python writes it, on one line and at most 80 characters long."""
    text = repr(value)
    return " ".join((text if len(text) <= 80 else text[:77] + "...").split())
