"""Metrics of rewards and lengths against numbers derived by hand from conftest's batch, and warnings about them."""

import math

import pytest
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from rlmt.callbacks import CoTLength, PolicyHealth, RewardCurves
from rlmt.errors import UserError
from rlmt.modules.metrics import reward_metrics

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


def test_lengths_and_rewards_reach_the_csv_at_their_step(world, tmp_path):
    world.fit(tmp_path, [], steps=3)
    rows = world.csv(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2]
    for step, row in enumerate(rows):
        grown = {"reward/mean": 3.5 + step, "reward/classifier": 3.0 + step}
        for name, value in (LENGTHS | REWARDS | grown).items():
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
