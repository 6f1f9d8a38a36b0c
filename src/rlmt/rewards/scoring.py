"""From splits to scores: which text of each sample a reward may see, and what a malformed sample gets.

A reward sees the response and never the thought. The one exception has to be asked for by name: `score_all`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rlmt.distributed.collectives import all_gather_object, run_on_all_ranks
from rlmt.errors import UserError
from rlmt.rewards.base import Reward
from rlmt.types import Message, Scores, Split

MalformedMode = Literal["penalty", "null", "score_all"]
"""What a malformed sample gets.

`penalty`: no reward sees it; it gets the penalty, or the lowest score of a well-formed sample in the batch if that is
    lower, so that it never does better than a well-formed one.
`null`: the literal text `[NULL]` is scored in its place (the strict mode of the paper's code).
`score_all`: ITS WHOLE TEXT IS SCORED, THE THOUGHT AND THE TAGS INCLUDED (the default mode of the paper's code). This is
    the one way in which a thought can reach a reward: a policy that never closes its thought is rewarded for it. It is
    here to reproduce runs of that code, not to train with.
"""

_CURE = ": mend it, and go on with --ckpt_path last"


class BadScores(UserError, RuntimeError):
    """A reward broke its contract."""


NULL_TEXT = "[NULL]"
"""What is scored in place of a malformed sample in mode `null`."""


def score(
    reward: Reward,
    prompts: Sequence[list[Message]],
    splits: Sequence[Split],
    texts: Sequence[str],
    mode: MalformedMode = "penalty",
    penalty: float = -10.0,
) -> Scores:
    """Scores B samples, malformed ones by `mode` (see `MalformedMode`).

    Every rank of a distributed run must call this together. In mode `penalty` the lowest well-formed score is that
    of all ranks, so that the malformed samples of a batch fare alike however it is spread.

    Args:
        reward: A loaded reward.
        prompts: B conversations, one a sample.
        splits: B splits.
        texts: B decoded completions with their tags; read only in mode `score_all`.
        mode: What a malformed sample gets.
        penalty: The score of a malformed sample in mode `penalty`.

    Returns:
        Scores on the CPU; in mode `penalty` the parts of a malformed sample are NaN and its text is None.

    Raises:
        BadScores: A reward gave the wrong number of scores or one that is not finite.
        UserError: Unknown mode.
    """
    if not len(prompts) == len(splits) == len(texts):
        raise ValueError(f"{len(prompts)} prompts, {len(splits)} splits and {len(texts)} texts: need as many of each")
    shown = [_shown_text(split, text, mode) for split, text in zip(splits, texts, strict=True)]
    rows = [i for i, text in enumerate(shown) if text is not None]

    def scores() -> tuple[Tensor, dict[str, Tensor]]:
        total, parts = reward.score_parts(
            [prompts[i] for i in rows], [text for text in shown if text is not None], [splits[i].status for i in rows]
        )
        total = _checked(total, reward.name, len(rows))
        return total, {name: _checked(values, name, len(rows)) for name, values in parts.items()}

    scored, scored_parts = run_on_all_ranks(scores)
    floor = min(all_gather_object(min([penalty, *scored.tolist()]))) if mode == "penalty" else penalty
    total = torch.full((len(splits),), floor, dtype=torch.float32)
    total[rows] = scored
    parts = {}
    for name, values in scored_parts.items():
        parts[name] = torch.full((len(splits),), float("nan"), dtype=torch.float32)
        parts[name][rows] = values
    return Scores(total=total, parts=parts, texts=shown)


def _shown_text(split: Split, text: str, mode: MalformedMode) -> str | None:
    """What a reward sees of one sample, None for nothing."""
    if split.ok:
        return split.response
    match mode:
        case "penalty":
            return None
        case "null":
            return NULL_TEXT
        case "score_all":
            return text
    raise UserError(f"malformed mode {mode!r} is unknown: use penalty, null or score_all")


def _checked(scores: Tensor, name: str, count: int) -> Tensor:
    """`scores` as float32 on the CPU, if they are `count` finite numbers."""
    if scores.shape != (count,):
        raise BadScores(f"reward {name!r} gave scores of shape {list(scores.shape)} for {count} responses{_CURE}")
    scores = scores.detach().to("cpu", torch.float32)
    bad = int((~scores.isfinite()).sum())
    if bad:
        raise BadScores(f"reward {name!r} gave {bad} of {count} scores that are not finite{_CURE}")
    return scores
