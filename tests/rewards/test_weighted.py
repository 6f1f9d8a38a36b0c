"""WeightedSum: totals by hand, raw parts, errors, and creation from YAML."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from rlmt.errors import UserError
from rlmt.rewards import ClassifierReward, LengthWindow, RegexReward, Reward, WeightedSum
from rlmt.rewards.base import load_running_states, running_states
from rlmt.types import Prompt, Status

PROMPT = Prompt(0, [{"role": "user", "content": "hi"}])
A, B = RegexReward("a", name="has_a"), RegexReward("b", name="has_b")


def test_total_is_the_weighted_sum_and_parts_are_raw() -> None:
    reward = WeightedSum([A, LengthWindow(4, 8, 4)], [2.0, -0.5])
    reward.check()
    total, parts = reward.score_parts([PROMPT] * 3, ["a", "bbb", "aaaa"], [Status.OK] * 3)
    assert parts["has_a"].tolist() == [1, 0, 1]
    assert parts["length_window"].tolist() == [0.25, 0.75, 1]
    # standard deviations 2·√(2/9) and 0.5·√(1/3·(0.25² + 0.75² + 1) - (2/3)²)
    spreads = [2 * math.sqrt(2) / 3, 0.5 * math.sqrt((0.0625 + 0.5625 + 1) / 3 - 4 / 9)]
    shares = [spread / sum(spreads) for spread in spreads]
    assert parts["has_a_share"].tolist() == pytest.approx([shares[0]] * 3)
    assert parts["length_window_share"].tolist() == pytest.approx([shares[1]] * 3)
    assert (
        list(parts) == ["has_a", "length_window", "has_a_share", "length_window_share"] and len(reward.part_names) == 4
    )
    assert total.tolist() == [1.875, -0.375, 1.5]
    assert reward.score([PROMPT] * 3, ["a", "bbb", "aaaa"], [Status.OK] * 3).tolist() == [1.875, -0.375, 1.5]


def test_nested_sums_keep_the_names_of_their_parts() -> None:
    reward = WeightedSum([WeightedSum([A, B], [1.0, 3.0]), RegexReward("c", name="has_c")], [10.0, 1.0])
    reward.check()
    total, parts = reward.score_parts([PROMPT], ["bc"], [Status.OK])
    raw = {name: part.tolist() for name, part in parts.items() if "share" not in name}
    assert raw == {"has_a": [0], "has_b": [1], "has_c": [1]}
    assert all(parts[f"{name}_share"].tolist() == [0] for name in (*raw, "weighted_sum"))  # one sample has no spread
    assert sorted(parts) == sorted(reward.part_names)
    assert total.tolist() == [31]


class Given(Reward):
    """Scores that the test sets."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.values = name, [0.0]

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        return torch.tensor(self.values)


def totals(reward: WeightedSum, *values: list[float]) -> list[float]:
    for part, scores in zip(reward.parts, values, strict=True):
        part.values = scores  # type: ignore[assignment]
    size = len(values[0])
    return [float(x) for x in reward.score([PROMPT] * size, ["a"] * size, [Status.OK] * size)]


def test_scores_on_their_own_scales_count_alike() -> None:
    reward = WeightedSum([Given("logit"), Given("rule")], [1.0, 2.0], ["batch_std", "batch_std"])
    reward.check()
    # standard deviations 20 and 0.5
    assert totals(reward, [-20.0, 20.0, -20.0, 20.0], [1.0, 0.0, 0.0, 1.0]) == pytest.approx([3, 1, -1, 5])
    _, parts = reward.score_parts([PROMPT] * 4, ["a"] * 4, [Status.OK] * 4)
    assert parts["logit_share"].tolist() == pytest.approx([1 / 3] * 4)
    assert parts["logit"].tolist() == [-20, 20, -20, 20]
    assert totals(reward, [3.0, 3.0], [1.0, 0.0]) == pytest.approx([7, 3])  # equal scores are not divided
    assert totals(reward, [0.1, 0.1, 0.1], [0.0, 0.0, 0.0]) == pytest.approx([0.1] * 3)


def test_running_scale_is_that_of_all_training_batches() -> None:
    reward = WeightedSum([Given("logit"), Given("rule")], [1.0, 1.0], ["running_std", "none"])
    batches = [[2.0, 2.0], [5.0, -3.0, 1.0], [], [10.0]]
    seen: list[float] = []
    for batch in batches:
        seen += batch
        deviation = statistics.pstdev(seen) or 1.0
        assert totals(reward, batch, [0.0] * len(batch)) == pytest.approx([x / deviation for x in batch], rel=1e-6)
    reward.train(False)
    assert totals(reward, [100.0], [0.0]) == pytest.approx([100 / statistics.pstdev(seen)])
    resumed = WeightedSum([Given("logit"), Given("rule")], [1.0, 1.0], ["running_std", "none"])
    load_running_states(nn.ModuleList([resumed]), running_states(nn.ModuleList([reward])))
    reward.train(True)
    assert totals(resumed, [7.0, 8.0], [0.0] * 2) == totals(reward, [7.0, 8.0], [0.0] * 2)


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


def test_invalid_scale_is_refused() -> None:
    with pytest.raises(UserError, match="has 2 rewards and 1 values in scale; set one per reward"):
        WeightedSum([A, B], [1.0, 1.0], ["batch_std"]).check()


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
    scale: [running_std, none, batch_std, none, none]
"""


def test_created_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a folder without runs/tiny
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    reward = parser.instantiate_classes(parser.parse_string(YAML)).reward
    assert isinstance(reward, WeightedSum)
    assert [part.name for part in reward.parts] == ["reward_model", "polite", "hypot", "length_window", "format"]
    assert reward.weights == [1.0, 0.2, 0.001, 1.0, 2.0]
    assert reward.scale == ["running_std", "none", "batch_std", "none", "none"]
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
