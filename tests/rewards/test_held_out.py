"""Held-out rewards: their scores and names, and early stopping on them."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlmt.cli.commands import main
from rlmt.errors import UserError
from rlmt.models import loading
from rlmt.rewards import ClassifierReward, RegexReward, Reward, WeightedSum
from rlmt.rewards.held_out import HeldOutRewards
from rlmt.types import Experience, FinishReason, Prompt, RolloutBatch, Sampling, Scores, Split, Status

# Scores of a reward at each validation of 4 prompts: the third is the best; three later ones are not better.
DRIFT = """
CURVE = [1.0, 2.0, 5.0, 3.0, 4.0, 4.5, 9.0]
calls = 0

def score(prompt, response):
    global calls
    calls += 1
    return CURVE[(calls - 1) // 4]
"""
DRIFTING = {"class_path": "CallableReward", "init_args": {"function": "drift.score", "name": "skywork_v2"}}


def classifier(model: str | Path, name: str) -> dict[str, Any]:
    return {"class_path": "ClassifierReward", "init_args": {"model": str(model), "name": name}}


Command = Callable[..., list[str]]


@pytest.fixture
def command(tiny: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Arguments of a tiny run with configs/early_stop.yaml, its held-out reward replaced by the passed ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "drift.py").write_text(DRIFT)
    monkeypatch.syspath_prepend(tmp_path)

    def arguments(name: str, held_out: list[dict[str, Any]], *more: object) -> list[str]:
        options = {
            "--model.policy": tiny / "policy",
            "--model.reward.model": tiny / "reward",
            "--model.held_out_rewards": json.dumps(held_out),
            "--model.format": "no_think",
            "--data.prompts": prompts_file,
            "--data.engine": "TransformersEngine",
            "--data.batch_size": 4,
            "--data.group_size": 4,
            "--data.max_prompt_tokens": 256,
            "--data.max_new_tokens": 16,
            "--data.val_size": 4,
            "--trainer.max_steps": 9,
            "--trainer.val_check_interval": 1,
            "--trainer.default_root_dir": tmp_path / "run",
            "--trainer.enable_progress_bar": "false",
        }
        configs = [word for config in ("base", "grpo", "tiny", "early_stop") for word in ("--config", config)]
        return [name, *configs, *(str(word) for pair in options.items() for word in pair), *map(str, more)]

    return arguments


def read(run: Path, metric: str) -> list[float]:
    with (run / "version_0" / "metrics.csv").open() as file:
        return [float(row[metric]) for row in csv.DictReader(file) if row.get(metric)]


@pytest.mark.slow
def test_run_stops_when_the_held_out_score_falls_and_keeps_its_best_checkpoint(
    command: Command, tiny: Path, tmp_path: Path
) -> None:
    twin = classifier(tiny / "reward", "twin")
    # Malformed samples are scored, too, so that every validation calls the function four times.
    assert main(command("fit", [DRIFTING, twin], "--model.malformed", "null")) == 0
    run = tmp_path / "run"
    assert read(run, "val/skywork_v2") == [1.0, 2.0, 5.0, 3.0, 4.0, 4.5]
    assert len(read(run, "reward/mean")) == 6  # of the 9 steps allowed
    assert read(run, "val/twin") == read(run, "val/reward_mean")  # the same reward model, loaded twice
    # Steps with equal rewards skip the optimizer step, so the number of the best step may be lower.
    best, last = sorted((run / "latest" / "checkpoints").glob("*.ckpt"))
    assert best.name in ("best-step=2.ckpt", "best-step=3.ckpt") and last.name == "last.ckpt"
    saved = torch.load(best, weights_only=True)
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {"policy"}
    (curves,) = (state for name, state in saved["callbacks"].items() if "RewardCurves" in name)
    assert curves["validation"]["val/skywork_v2"] == [1.0, 2.0, 5.0]


def test_predict_does_not_load_held_out_rewards(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeldOutRewards, "load", lambda self: pytest.fail("loaded"))
    assert main(command("predict", [DRIFTING], "--data.max_new_tokens", 2)) == 0


@pytest.mark.parametrize(
    ("held_out", "options", "named"),
    [
        ([DRIFTING, classifier("a/b/c", "reward_model")], [], ["'reward_model'"]),
        ([DRIFTING, classifier("a/b/c", "other")], [], ["a/b/c"]),
        ([DRIFTING], ["--data.val_size", 0], ["skywork_v2", "--data.val_size"]),
    ],
    ids=["name of the trained reward", "no such model", "no validation"],
)
def test_error_is_one_line_before_any_model_is_loaded(
    held_out: list[dict[str, Any]],
    options: list[object],
    named: list[str],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loading, "load_policy", lambda *args, **options: pytest.fail("loaded"))
    assert main(command("fit", held_out, *options)) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error")]
    assert all(word in message for word in named), message


class Says(Reward):
    def __init__(self, name: str, values: Sequence[float] = ()) -> None:
        super().__init__()
        self.name, self.values = name, values

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], statuses: Sequence[Status]) -> Tensor:
        assert responses == ["a", "b"]  # never a thought
        return torch.tensor(self.values)


def test_malformed_samples_get_the_lowest_score_of_each_reward() -> None:
    splits = [Split("t", "a", Status.OK), Split("", "", Status.UNCLOSED), Split("t", "b", Status.OK)]
    rollouts = RolloutBatch(
        prompts=[Prompt(0, [{"role": "user", "content": "?"}])],
        group_size=3,
        prompt_ids=[[1]],
        completion_ids=[[1]] * 3,
        engine_logprobs=torch.zeros(3),
        finish=[FinishReason.STOP] * 3,
        sampling=Sampling(1.0, 1),
        weight_version=0,
    )
    experience = Experience(
        rollouts=rollouts,
        texts=["<think>t</think>a", "<think>", "<think>t</think>b"],
        splits=splits,
        thought_tokens=torch.ones(3),
        scores=Scores(torch.zeros(3), {}, []),
        group=torch.zeros(3),
        lengths=torch.ones(3),
        engine_logprobs=torch.zeros(3),
    )
    held_out = HeldOutRewards([Says("low", [-20.0, 5.0]), Says("high", [1.0, 3.0])])
    # (-20 - 20 + 5) / 3: the lowest score is below the penalty; (1 - 10 + 3) / 3: the penalty
    scores = held_out.scores(experience, "penalty", -10.0)
    means = {name: float(of_reward.total.mean()) for name, of_reward in scores.items()}
    assert means == pytest.approx({"low": -35 / 3, "high": -2.0})
    assert HeldOutRewards().scores(experience, "penalty", -10.0) == {}


@pytest.mark.parametrize("names", [("a", "a"), ("polite",), ("reward_mean",), ("thought_tokens",)])
def test_names_must_be_distinct(names: tuple[str, ...]) -> None:
    trained = WeightedSum([ClassifierReward("unread"), RegexReward("please", name="polite")], [1.0, 1.0])
    with pytest.raises(UserError, match=f"--model.held_out_rewards: the name '{names[0]}' is used"):
        HeldOutRewards([Says(name) for name in names]).check(trained)
    HeldOutRewards([Says("b"), Says("c")]).check(trained)


def test_every_held_out_reward_is_checked() -> None:
    with pytest.raises(UserError, match="is not a regular expression"):
        HeldOutRewards([Says("a"), RegexReward("(", name="b")]).check(Says("trained"))
