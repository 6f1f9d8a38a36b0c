"""Scores by a reward: kept in a file, and computed again only where the reward, its files or a text have changed."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rlmt.errors import UserError
from rlmt.evaluation.compare import scores
from rlmt.evaluation.compare.pairs import Pair
from rlmt.evaluation.compare.scores import check_reward, score_pairs
from rlmt.rewards import RegexReward, Reward
from rlmt.rewards.base import set_resume
from rlmt.types import Prompt, Split, Status


class Counting(RegexReward):
    """Counts what it scores; it poses as one of the package's rewards, whose options say what they compute."""

    __module__ = "rlmt.rewards.rules"

    def __init__(self, pattern: str, fails_after: int = 1000) -> None:
        super().__init__(pattern, "count")
        self._left, self._scored = fails_after, 0

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        self._scored += len(responses)
        if self._scored > self._left:
            raise UserError("out of order.")
        return super().score(prompts, responses, statuses)


def make_pairs(count: int) -> list[Pair]:
    """Pairs of which every fifth has a malformed completion."""
    malformed = Split("endless", "", Status.UNCLOSED)
    return [
        Pair(
            Prompt(n, [{"role": "user", "content": "Hi"}]),
            malformed if n % 5 == 0 else Split("", f"yes {n}", Status.OK),
            Split("", "yes" if n % 2 else "no", Status.OK),
        )
        for n in range(count)
    ]


def test_malformed_pairs_have_no_scores(tmp_path: Path) -> None:
    reward = Counting("yes")
    reward.name = "[/x] in brackets"  # the label of the progress bar
    first, second = score_pairs(reward, make_pairs(10), tmp_path / "s.parquet", "cpu")
    assert [math.isnan(value) for value in first] == [n % 5 == 0 for n in range(10)]
    assert second[1:5].tolist() == [1.0, 0.0, 1.0, 0.0] and first[1:5].tolist() == [1.0] * 4


def test_stopped_scoring_continues_after_the_last_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "BATCH", 4)
    pairs, path = make_pairs(20), tmp_path / "scores" / "s.parquet"
    with pytest.raises(UserError, match="out of order"):
        score_pairs(Counting("yes", fails_after=20), pairs, path, "cpu")
    resumed = Counting("yes")
    found = score_pairs(resumed, pairs, path, "cpu")
    assert resumed._scored == 2 * 16 - 16  # two batches of four pairs were kept
    whole = score_pairs(Counting("yes"), pairs, tmp_path / "other.parquet", "cpu")
    np.testing.assert_array_equal(found, whole)


def test_changed_reward_or_text_is_scored_again(tmp_path: Path) -> None:
    pairs, path = make_pairs(6), tmp_path / "s.parquet"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("a")
    score_pairs(Counting(str(folder)), pairs, path, "cpu")
    same, changed = Counting(str(folder)), Counting(str(folder))
    score_pairs(same, pairs, path, "cpu")
    os.utime(folder / "weights", ns=(1, 1))
    score_pairs(changed, pairs, path, "cpu")
    assert (same._scored, changed._scored) == (0, 8)
    other = Counting("no")
    score_pairs(other, pairs, path, "cpu")
    again = Counting("no")
    score_pairs(again, pairs[:4], path, "cpu")
    assert (other._scored, again._scored) == (8, 6)


def test_own_code_is_always_run(tmp_path: Path) -> None:
    class Own(Counting):
        __module__ = "my_rewards"

    for _ in range(2):
        reward = Own("yes")
        score_pairs(reward, make_pairs(4), tmp_path / "s.parquet", "cpu")
        assert reward._scored == 6


def test_error_of_a_reward_names_what_continues(tmp_path: Path) -> None:
    class Broken(Reward):
        def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
            return torch.full((len(responses),), math.inf)

    reward = Broken()
    check_reward(reward)
    set_resume(reward, "run it again")
    with pytest.raises(UserError, match="8 of 8 scores that are not finite; fix it, and run it again"):
        score_pairs(reward, make_pairs(5), tmp_path / "s.parquet", "cpu")


def test_long_text_among_the_options_is_no_folder(tmp_path: Path) -> None:
    first, _ = score_pairs(Counting("yes|" + "x" * 5000), make_pairs(2), tmp_path / "s.parquet", "cpu")
    assert first[1] == 1.0
