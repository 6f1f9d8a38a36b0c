"""Metrics of rewards and lengths against numbers derived by hand from conftest's batch, and warnings about them."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from rlmt.callbacks import CoTLength, PolicyHealth, RewardCurves
from rlmt.errors import UserError
from rlmt.modules.metrics import response_metrics, reward_metrics
from rlmt.rewards import RegexReward
from rlmt.rewards.held_out import HeldOutRewards

LENGTHS = {
    "length/thought_mean": 35.0,
    "length/thought_p95": 57.5,  # rank 0.95 * 5 = 4.75 between the sorted 50 and 60
    "length/response_mean": 2.5,
    "length/response_p95": 4.75,  # sorted: 0 1 2 3 4 5
    "length/truncated": 1 / 6,
}
REWARDS = {
    "reward/mean": 3.5,
    "reward/std": math.sqrt(89 / 6 - 3.5**2),
    "reward/group_std": math.sqrt(2 / 3) / 2,  # 1 2 3 in one group, 5 5 5 in the other
    "reward/zero_std_groups": 0.5,
    "reward/malformed": 1 / 6,
    "reward/classifier": 3.0,  # the malformed sample's NaN left out
}


RESPONSES = {
    # rewards -1 0 1 and 0 0, lengths -1 0 1 and -0.5 0.5 around the means of their prompts: 2 / √(2 · 2.5)
    "reward/length_correlation": 2 / math.sqrt(5),
    "response/distinct_2": 1.0,
}


def test_lengths_and_rewards_reach_the_csv_at_their_step(world, tmp_path):
    world.fit(tmp_path, [], steps=3)
    rows = world.csv(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2]
    for step, row in enumerate(rows):
        grown = {"reward/mean": 3.5 + step, "reward/classifier": 3.0 + step}
        for name, value in (LENGTHS | REWARDS | RESPONSES | grown).items():
            assert row[name] == pytest.approx(value, rel=1e-6), name
        assert math.isnan(row["reward/none"])
        assert "reward" not in row and "thought" not in row, "the short names are for the progress bar alone"


def test_metrics_without_well_formed_samples(world, tmp_path):
    world.fit(tmp_path, [CoTLength(), RewardCurves()], steps=1, module=world.Module(malformed=True))
    (row,) = world.csv(tmp_path)
    assert row["reward/malformed"] == 1
    assert math.isnan(row["reward/classifier"])
    assert row["reward/mean"] == 3.5
    assert (tmp_path / "curves.png").is_file()


def test_repetition_and_length_are_those_of_well_formed_responses(world):
    experience = world.experience()
    completions = experience.rollouts.completion_ids
    completions[0][:] = [7] * 10 + [1]  # one token has no pair
    completions[1][:] = [7] * 20 + [5, 5, 5, 5]  # one of three pairs is distinct
    completions[4][:] = [7] * 50 + [1, 2, 1, 2, 1]  # two of four
    completions[2][:], completions[3][:] = [7] * 30 + [1, 2, 3], [7] * 40 + [1, 2, 3, 4]
    metrics = response_metrics(experience)
    assert metrics["response/distinct_2"] == pytest.approx((1 / 3 + 1 + 1 + 1 / 2) / 4)
    assert response_metrics(world.experience(malformed=True))["reward/length_correlation"] == 0
    equal = world.experience()
    equal.scores.total = torch.full((6,), 0.1)
    assert response_metrics(equal)["reward/length_correlation"] == 0


def validate(health, rewards, held_out):
    """Warnings of a run whose validations have these scores."""
    module = SimpleNamespace(held_out=HeldOutRewards([RegexReward("a", name="other")]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for reward, other in zip(rewards, held_out, strict=True):
            logged = {"val/reward_mean": torch.tensor(reward), "val/other": torch.tensor(other)}
            state = SimpleNamespace(fn="fit")
            trainer = SimpleNamespace(callback_metrics=logged, sanity_checking=False, state=state)
            health.on_validation_end(trainer, module)
    return [str(warning.message) for warning in caught]


def test_falling_held_out_reward_warns_once_while_the_reward_rises():
    (warning,) = validate(PolicyHealth(), [1.0, 2.0, 1.5, 3.0, 4.0], [9.0, 8.0, 7.0, 6.0, 5.0])
    assert warning.startswith(
        "val/other fell from 9 to 6 in 3 validations in a row while val/reward_mean rose from 1 to 3"
    )
    assert "\n" not in warning
    assert not validate(PolicyHealth(), [1.0, 2.0, 3.0, 4.0], [9.0, 8.0, 8.0, 7.0]), "it does not fall every time"
    assert not validate(PolicyHealth(), [4.0, 3.0, 2.0, 1.0], [9.0, 8.0, 7.0, 6.0]), "the reward falls, too"
    assert not validate(PolicyHealth(validations=4), [1.0, 2.0, 3.0, 4.0], [9.0, 8.0, 7.0, 6.0])
    first, resumed = PolicyHealth(validations=2), PolicyHealth(validations=2)
    assert not validate(first, [1.0, 2.0], [9.0, 8.0])
    resumed.load_state_dict(first.state_dict())
    assert len(validate(resumed, [3.0], [7.0])) == 1


def test_single_sample_has_standard_deviation_zero(world):
    experience = world.experience()
    one = slice(0, 1)
    experience.scores.total, experience.group = experience.scores.total[one], experience.group[one]
    metrics = reward_metrics(experience)
    assert metrics["reward/std"] == metrics["reward/group_std"] == 0
    assert metrics["reward/zero_std_groups"] == 1


def test_reward_named_like_a_metric_is_refused(world):
    experience = world.experience()
    experience.scores.parts = {"std": experience.scores.total}
    with pytest.raises(UserError, match="'std'"):
        reward_metrics(experience)


@pytest.mark.parametrize("name", ["engine/mismatch_max", "policy/ratio_max"])
@pytest.mark.parametrize(("value", "warnings"), [(0.99, 0), (20.0, 1), (math.nan, 1)])
def test_metric_out_of_range_warns_once(world, tmp_path, recwarn, name, value, warnings):
    world.fit(tmp_path, [PolicyHealth()], steps=3, module=world.Module(metrics={name: value}))
    assert len([w for w in recwarn if name in str(w.message)]) == warnings


@pytest.mark.parametrize(("pairs", "warnings"), [(2.0, 0), (0.0, 1)])
def test_step_without_pairs_warns_once(world, tmp_path, recwarn, pairs, warnings):
    metrics = {"dpo/pairs": pairs, "dpo/skipped_malformed": 2.0, "dpo/skipped_margin": 1.0, "dpo/skipped_length": 0.0}
    world.fit(tmp_path, [PolicyHealth()], steps=3, module=world.Module(metrics=metrics))
    messages = [str(w.message) for w in recwarn if "no prompt of a step has a pair" in str(w.message)]
    assert len(messages) == warnings
    assert all("2 malformed, 1 margin, 0 length" in message for message in messages)


@pytest.mark.parametrize(("malformed", "warnings"), [(False, 0), (True, 1)])
def test_policy_without_the_format_warns_once(world, tmp_path, recwarn, malformed, warnings):
    world.fit(tmp_path, [PolicyHealth()], steps=3, module=world.Module(malformed=malformed))
    assert (
        len([w for w in recwarn if "all 6 samples of a step are malformed (6 unclosed)" in str(w.message)]) == warnings
    )


def test_every_logger_gets_the_metrics(world, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = WandbLogger(save_dir=tmp_path, offline=True)
    board = TensorBoardLogger(tmp_path, name="board", version="")
    world.fit(tmp_path, [], logger=[board, wandb])
    events = EventAccumulator(board.log_dir)
    events.Reload()
    for name, value in {"reward/mean": 4.5, "length/thought_p95": 57.5, "policy/kl": 0.002}.items():
        assert [event.step for event in events.Scalars(name)] == [0, 1]
        assert events.Scalars(name)[-1].value == pytest.approx(value)
        assert wandb.experiment.summary[name] == pytest.approx(value)
    wandb.experiment.finish()


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_the_progress_bar_shows_reward_thought_and_kl(world, tmp_path, capsys, bar):
    from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

    callbacks = [TQDMProgressBar() if bar == "tqdm" else RichProgressBar(console_kwargs={"width": 200})]
    world.fit(tmp_path, callbacks, enable_progress_bar=True, module=world.Module(metrics={"dpo/accuracy": 0.75}))
    shown = capsys.readouterr().out
    tqdm, rich = ("reward=4.500", "thought=35.00", "kl=0.002"), ("reward: 4.500", "thought: 35.000", "kl: 0.002")
    tqdm, rich = (*tqdm, "accuracy=0.750"), (*rich, "accuracy: 0.750")
    for text in tqdm if bar == "tqdm" else rich:
        assert text in shown


@pytest.mark.parametrize("name", ["max_mismatch", "max_ratio"])
def test_policy_health_refuses_limits_out_of_range(name):
    with pytest.raises(UserError, match=f"PolicyHealth.{name}"):
        PolicyHealth(**{name: 0.0})


def test_callback_refuses_a_module_without_experience(world, tmp_path):
    class Other(world.Module):
        def training_step(self, batch, batch_idx):
            return None

    with pytest.raises(TypeError, match="experience"):
        world.fit(tmp_path, [CoTLength()], module=Other())
