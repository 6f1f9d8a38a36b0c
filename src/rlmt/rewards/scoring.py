"""Scoring of samples: selects the text that a reward sees, and scores malformed samples.

A reward sees the response and never the thought. The only exception is the mode `score_all`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from rlmt import progress
from rlmt.distributed.collectives import all_gather_object, run_on_all_ranks
from rlmt.errors import UserError, describe_own_error
from rlmt.rewards.base import Reward, all_rewards
from rlmt.types import Prompt, Scores, Split, Status

MalformedMode = Literal["penalty", "null", "score_all"]
"""How a malformed sample is scored.

`penalty`: No reward sees it. Its score is the penalty, or the lowest score of a well-formed sample in the batch if that
    is lower, so that it never scores higher than a well-formed one.
`null`: The literal text `[NULL]` is scored instead (the strict mode of the paper's code).
`score_all`: THE COMPLETE TEXT IS SCORED, INCLUDING THE THOUGHT AND THE TAGS (the default mode of the paper's code). It
    is the only mode in which a thought can reach a reward: a policy that never closes its thought is rewarded for it.
    Use it to reproduce runs of that code, not for training.
"""


class BadScores(UserError, RuntimeError):
    """A reward returned the wrong number of scores, or scores that are not finite."""


NULL_TEXT = "[NULL]"
"""Text that is scored instead of a malformed sample in mode `null`."""


def score(
    reward: Reward,
    prompts: Sequence[Prompt],
    splits: Sequence[Split],
    texts: Sequence[str],
    mode: MalformedMode = "penalty",
    penalty: float = -10.0,
) -> Scores:
    """Scores B samples; `mode` determines the scores of malformed ones (see `MalformedMode`).

    The call is collective: all ranks must make it. In mode `penalty` the lowest well-formed score is taken over all
    ranks, so the score of malformed samples does not depend on how a batch is sharded.

    Args:
        reward: A loaded reward.
        prompts: B prompts, one per sample.
        splits: B splits.
        texts: B decoded completions with their tags; read only in mode `score_all`.
        mode: How malformed samples are scored.
        penalty: Score of a malformed sample in mode `penalty`.

    Returns:
        Scores on the CPU. In mode `penalty` the parts of a malformed sample are NaN and its text is None.

    Raises:
        BadScores: A reward returned the wrong number of scores, or scores that are not finite.
        UserError: The mode is unknown.
    """
    shown, rows, batch = _batch_to_score(prompts, splits, texts, mode)

    def score_shown() -> tuple[Tensor, dict[str, Tensor]]:
        progress.report("scoring", 0, len(rows))
        try:
            total, parts = reward.score_parts(*batch)
        except UserError:
            raise
        except Exception as error:
            if (what := describe_own_error(error, batch[1])) is None:
                raise
            raise UserError(f"reward {reward.name!r} raised {what}; fix it, and {reward.resume}.") from error
        total = _check_scores(total, reward.name, len(rows), reward.resume)
        return total, {name: _check_scores(values, name, len(rows), reward.resume) for name, values in parts.items()}

    scored, scored_parts = run_on_all_ranks(score_shown)
    floor = min(all_gather_object(min([penalty, *scored.tolist()]))) if mode == "penalty" else penalty
    total = torch.full((len(splits),), floor, dtype=torch.float32)
    total[rows] = scored
    parts = {}
    for name, values in scored_parts.items():
        parts[name] = torch.full((len(splits),), float("nan"), dtype=torch.float32)
        parts[name][rows] = values
    return Scores(total=total, parts=parts, texts=shown)


def prefetch(
    rewards: nn.Module, prompts: Sequence[Prompt], splits: Sequence[Split], texts: Sequence[str], mode: MalformedMode
) -> bool:
    """Starts the requests of all rewards for the texts that `score` will pass to them; arguments as of `score`.

    The call is collective, like that of `score`.

    Returns:
        Whether a reward asks.
    """
    asking = [reward for reward in all_rewards(rewards) if reward.asks]
    *_, batch = _batch_to_score(prompts, splits, texts, mode)

    def start() -> None:
        for reward in asking:
            reward.prefetch(*batch)

    if asking:
        run_on_all_ranks(start)
    return bool(asking)


def check_inputs(rewards: nn.Module, mode: MalformedMode, extra_columns: Sequence[str]) -> None:
    """Checks that rewards have the columns that they read, and that none sends thoughts to another process.

    Args:
        rewards: The rewards.
        mode: How malformed samples are scored.
        extra_columns: Columns that are read from the prompt set.

    Raises:
        UserError: A column is missing, or the mode is `score_all` and a reward asks.
    """
    for reward in all_rewards(rewards):
        for column in sorted(reward.columns.difference(extra_columns)):
            raise UserError(
                f"--data.extra_columns does not have {column!r}, which reward {reward.name!r} reads; add it."
            )
    asking = [reward.name for reward in all_rewards(rewards) if reward.asks]
    if mode == "score_all" and asking:
        raise UserError(
            f"--model.malformed is score_all, which would send thoughts to the service of reward {asking[0]!r}; use "
            "penalty or null."
        )


Batch = tuple[list[Prompt], list[str], list[Status]]
"""Arguments of `Reward.score`."""


def _batch_to_score(
    prompts: Sequence[Prompt], splits: Sequence[Split], texts: Sequence[str], mode: MalformedMode
) -> tuple[list[str | None], list[int], Batch]:
    """The text of each sample that a reward sees, the samples with one, and the arguments of `Reward.score`."""
    if not len(prompts) == len(splits) == len(texts):
        raise ValueError(f"{len(prompts)} prompts, {len(splits)} splits and {len(texts)} texts: the lengths must match")
    shown = [_text_to_score(split, text, mode) for split, text in zip(splits, texts, strict=True)]
    rows = [i for i, text in enumerate(shown) if text is not None]
    responses = [text for text in shown if text is not None]
    return shown, rows, ([prompts[i] for i in rows], responses, [splits[i].status for i in rows])


def _text_to_score(split: Split, text: str, mode: MalformedMode) -> str | None:
    """The text of a sample that a reward sees, or None."""
    if split.ok:
        return split.response
    match mode:
        case "penalty":
            return None
        case "null":
            return NULL_TEXT
        case "score_all":
            return text
    raise UserError(f"--model.malformed is {mode!r}, which is unknown; use penalty, null or score_all.")


def _check_scores(scores: Tensor, name: str, count: int, resume: str) -> Tensor:
    """Converts scores to float32 on the CPU; raises BadScores unless they are `count` finite numbers."""
    if scores.shape != (count,):
        raise BadScores(
            f"reward {name!r} returned scores of shape {list(scores.shape)} for {count} responses; fix it, and "
            f"{resume}."
        )
    scores = scores.detach().to("cpu", torch.float32)
    bad = int((~scores.isfinite()).sum())
    if bad:
        raise BadScores(f"reward {name!r} returned {bad} of {count} scores that are not finite; fix it, and {resume}.")
    return scores
