"""WeightedSum: totals by hand, raw parts, errors, and creation from YAML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from torch import nn

from rlmt.errors import UserError
from rlmt.rewards import ClassifierReward, LengthWindow, RegexReward, Reward, WeightedSum
from rlmt.types import Prompt, Status

PROMPT = Prompt(0, [{"role": "user", "content": "hi"}])
A, B = RegexReward("a", name="has_a"), RegexReward("b", name="has_b")


def test_total_is_the_weighted_sum_and_parts_are_raw() -> None:
    reward = WeightedSum([A, LengthWindow(4, 8, 4)], [2.0, -0.5])
    reward.check()
    total, parts = reward.score_parts([PROMPT] * 3, ["a", "bbb", "aaaa"], [Status.OK] * 3)
    assert parts["has_a"].tolist() == [1, 0, 1]
    assert parts["length_window"].tolist() == [0.25, 0.75, 1]
    assert list(parts) == ["has_a", "length_window"]
    assert total.tolist() == [1.875, -0.375, 1.5]
    assert reward.score([PROMPT] * 3, ["a", "bbb", "aaaa"], [Status.OK] * 3).tolist() == [1.875, -0.375, 1.5]


def test_nested_sums_keep_the_names_of_their_parts() -> None:
    reward = WeightedSum([WeightedSum([A, B], [1.0, 3.0]), RegexReward("c", name="has_c")], [10.0, 1.0])
    reward.check()
    total, parts = reward.score_parts([PROMPT], ["bc"], [Status.OK])
    assert {name: part.tolist() for name, part in parts.items()} == {"has_a": [0], "has_b": [1], "has_c": [1]}
    assert total.tolist() == [31]


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        ([A], [1.0, 2.0], "has 1 rewards and 2 weights; set one weight per reward"),
        ([A, B], [1.0], "has 2 rewards and 1 weights"),
        ([], [], "has 0 rewards and 0 weights"),
        ([A, B], [1.0, float("nan")], "the weight of reward 'has_b' is nan"),
        ([A, RegexReward("x", name="has_a")], [1.0, 1.0], "two rewards named 'has_a'; set a different `name`"),
        ([A, WeightedSum([A], [1.0])], [1.0, 1.0], "two rewards named 'has_a'"),
        ([RegexReward("(")], [1.0], "is not a regular expression"),
    ],
)
def test_invalid_options_are_refused(rewards: list[Reward], weights: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        WeightedSum(rewards, weights).check()


def test_parts_are_loaded_and_are_submodules(reward_model: Callable[..., str]) -> None:
    reward = WeightedSum([ClassifierReward(reward_model()), A], [1.0, 0.5])
    reward.check()
    assert list(reward.parameters()) == []
    reward.load()
    assert len(list(reward.parameters())) > 0
    nn.ModuleList([reward]).train()
    assert not any(m.training for part in reward.parts for m in part.modules() if isinstance(part, ClassifierReward))
    total, parts = reward.score_parts([PROMPT] * 2, ["a", "b"], [Status.OK] * 2)
    assert total.tolist() == pytest.approx((parts["reward_model"] + 0.5 * parts["has_a"]).tolist(), abs=1e-6)


YAML = """
reward:
  class_path: rlmt.rewards.WeightedSum
  init_args:
    rewards:
      - class_path: rlmt.rewards.ClassifierReward
        init_args: {model: runs/tiny/reward, dtype: bfloat16, tokens_per_batch: 128}
      - class_path: rlmt.rewards.RegexReward
        init_args: {pattern: please, name: polite}
      - class_path: rlmt.rewards.CallableReward
        init_args: {function: math.hypot}
      - class_path: rlmt.rewards.LengthWindow
        init_args: {min_chars: 1, max_chars: 9, margin: 3}
      - class_path: rlmt.rewards.FormatReward
    weights: [1.0, 0.2, 1e-3, 1, 2]
"""


def test_created_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a folder without runs/tiny
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    reward = parser.instantiate_classes(parser.parse_string(YAML)).reward
    assert isinstance(reward, WeightedSum)
    assert [part.name for part in reward.parts] == ["reward_model", "polite", "hypot", "length_window", "format"]
    assert reward.weights == [1.0, 0.2, 0.001, 1.0, 2.0]
    classifier = reward.parts[0]
    assert isinstance(classifier, ClassifierReward)
    assert (classifier.source, classifier.dtype, classifier.tokens_per_batch) == ("runs/tiny/reward", "bfloat16", 128)
    with pytest.raises(UserError, match="rlmt tiny"):
        reward.check()


def test_created_from_the_command_line() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    values = parser.parse_args(["--reward", "rlmt.rewards.ClassifierReward", "--reward.model", "a/b"])
    reward = parser.instantiate_classes(values).reward
    assert isinstance(reward, ClassifierReward)
    assert reward.source == "a/b"
