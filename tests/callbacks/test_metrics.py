"""What the observing callbacks log, against numbers worked out by hand from conftest's batch."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

import rlmt.callbacks.throughput as throughput_module
from rlmt.callbacks import CoTLength, PolicyHealth, RewardCurves, Throughput
from rlmt.callbacks._common import over_ranks
from rlmt.callbacks.reward_curves import reward_metrics
from rlmt.errors import UserError

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
    "reward/judge": 3.0,  # the malformed sample's NaN left out
}


def test_lengths_and_rewards_reach_the_csv_at_their_step(world, tmp_path):
    world.fit(tmp_path, [CoTLength(), RewardCurves()], steps=3)
    rows = world.csv(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2]
    for step, row in enumerate(rows):
        grown = {"reward/mean": 3.5 + step, "reward/judge": 3.0 + step}
        for name, value in (LENGTHS | REWARDS | grown).items():
            assert row[name] == pytest.approx(value, rel=1e-6), name
        assert math.isnan(row["reward/none"])
        assert "reward" not in row and "thought" not in row, "the short names are for the progress bar alone"


def test_zero_well_formed_samples(world, tmp_path):
    world.fit(tmp_path, [CoTLength(), RewardCurves()], steps=1, module=world.Module(malformed=True))
    (row,) = world.csv(tmp_path)
    assert row["reward/malformed"] == 1
    assert math.isnan(row["reward/judge"])
    assert row["reward/mean"] == 3.5
    assert (tmp_path / "curves.png").is_file()


def test_a_single_sample_has_no_spread(world):
    experience = world.experience()
    one = slice(0, 1)
    experience.scores.total, experience.group = experience.scores.total[one], experience.group[one]
    metrics = reward_metrics(experience)
    assert metrics["reward/std"] == metrics["reward/group_std"] == 0
    assert metrics["reward/zero_std_groups"] == 1


def test_a_reward_named_like_a_metric_is_refused(world):
    experience = world.experience()
    experience.scores.parts = {"std": experience.scores.total}
    with pytest.raises(UserError, match="'std'"):
        reward_metrics(experience)


def test_validation_lengths_are_means_over_the_set(world, tmp_path):
    world.fit(tmp_path, [CoTLength()], validate=True)
    row = next(row for row in world.csv(tmp_path) if "val/thought_tokens" in row)
    assert row["val/thought_tokens"] == 35 and row["val/response_tokens"] == 2.5


def test_policy_health_logs_its_families_and_no_other(world, tmp_path):
    metrics = {"policy/loss": -0.5, "engine/weight_version": 4.0, "critic/loss": 2.0, "dpo/margin": 3.0, "x/y": 1.0}
    world.fit(tmp_path, [PolicyHealth()], steps=1, module=world.Module(metrics=metrics))
    (row,) = world.csv(tmp_path)
    assert row == pytest.approx(
        {"epoch": 0, "step": 0, "policy/kl": 0.001, "policy/entropy": 2, "policy/loss": -0.5}
        | {"engine/weight_version": 4, "critic/loss": 2, "dpo/margin": 3}
    )


@pytest.mark.parametrize("name", ["engine/mismatch_max", "policy/ratio_max"])
@pytest.mark.parametrize(("value", "warnings"), [(0.99, 0), (20.0, 1), (math.nan, 1)])
def test_trouble_warns_once(world, tmp_path, recwarn, name, value, warnings):
    world.fit(tmp_path, [PolicyHealth()], steps=3, module=world.Module(metrics={name: value}))
    assert len([w for w in recwarn if name in str(w.message)]) == warnings


@pytest.mark.parametrize(("pairs", "warnings"), [(2.0, 0), (0.0, 1)])
def test_a_step_without_pairs_warns_once(world, tmp_path, recwarn, pairs, warnings):
    metrics = {"dpo/pairs": pairs, "dpo/skipped_malformed": 2.0, "dpo/skipped_margin": 1.0, "dpo/skipped_length": 0.0}
    world.fit(tmp_path, [PolicyHealth()], steps=3, module=world.Module(metrics=metrics))
    told = [str(w.message) for w in recwarn if "no prompt of a step has a pair" in str(w.message)]
    assert len(told) == warnings
    assert all("2 malformed, 1 margin, 0 length" in message for message in told)


@pytest.mark.parametrize(("malformed", "warnings"), [(False, 0), (True, 1)])
def test_a_policy_that_does_not_know_the_format_is_told_once(world, tmp_path, recwarn, malformed, warnings):
    world.fit(tmp_path, [PolicyHealth()], steps=3, module=world.Module(malformed=malformed))
    assert (
        len([w for w in recwarn if "all 6 samples of a step are malformed (6 unclosed)" in str(w.message)]) == warnings
    )


def test_step_time_counts_fetching_and_leaves_validation_out(world, tmp_path, monkeypatch):
    clock = iter([100.0, 110.0, 1000.0, 1500.0, 1511.0, 2000.0, 2001.0])
    # start, end of step 0, validation from and to, end of step 1, validation from and to
    monkeypatch.setattr(throughput_module.time, "perf_counter", lambda: next(clock))
    callback, trainer = Throughput(), None
    module = world.Module()
    outputs = {"experience": world.experience(), "metrics": {"time/rollout_s": 0.25, "policy/kl": 1.0}}
    logged: list[tuple[str, float]] = []
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.append((name, value)))
    trainer = world.trainer(tmp_path, [])
    callback.on_train_start(trainer, module)
    callback.on_train_batch_end(trainer, module, outputs, None, 0)
    callback.on_validation_start(trainer, module)
    callback.on_validation_end(trainer, module)
    callback.on_train_batch_end(trainer, module, outputs, None, 1)
    tokens = 225  # 210 of thoughts and 15 of responses
    expected = [("time/rollout_s", 0.25), ("time/step_s", 10.0), ("perf/tokens_per_s", tokens / 10)]
    # 890 s from the end of step 0 to validation and 11 s after it
    expected += [("time/rollout_s", 0.25), ("time/step_s", 901.0), ("perf/tokens_per_s", tokens / 901)]
    assert logged == expected


def test_throughput_in_a_run(world, tmp_path):
    world.fit(tmp_path, [Throughput()], validate=True, val_check_interval=1)
    rows = [row for row in world.csv(tmp_path) if "time/step_s" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["time/rollout_s"] == 0.25
        assert 0 < row["time/step_s"] < 60
        assert row["perf/tokens_per_s"] == pytest.approx(225 / row["time/step_s"], rel=1e-4)


def test_every_logger_gets_the_metrics(world, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = WandbLogger(save_dir=tmp_path, offline=True)
    board = TensorBoardLogger(tmp_path, name="board", version="")
    world.fit(tmp_path, [CoTLength(), RewardCurves(), PolicyHealth(), Throughput()], logger=[board, wandb])
    events = EventAccumulator(board.log_dir)
    events.Reload()
    for name, value in {"reward/mean": 4.5, "length/thought_p95": 57.5, "policy/kl": 0.002}.items():
        assert [event.step for event in events.Scalars(name)] == [0, 1]
        assert events.Scalars(name)[-1].value == pytest.approx(value)
        assert wandb.experiment.summary[name] == pytest.approx(value)
    assert "perf/tokens_per_s" in events.Tags()["scalars"]
    wandb.experiment.finish()


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_the_progress_bar_shows_reward_thought_and_kl(world, tmp_path, capsys, bar):
    from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

    callbacks = [CoTLength(), RewardCurves(), PolicyHealth()]
    callbacks.append(TQDMProgressBar() if bar == "tqdm" else RichProgressBar(console_kwargs={"width": 200}))
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


def test_a_module_of_another_kind_is_told_apart(world, tmp_path):
    class Other(world.Module):
        def training_step(self, batch, batch_idx):
            return None

    with pytest.raises(TypeError, match="experience"):
        world.fit(tmp_path, [CoTLength()], module=Other())


def test_ranks_are_merged_by_what_a_metric_means():
    names = ["policy/ratio_max", "perf/tokens_per_s", "reward/mean", "reward/judge"]
    other = torch.tensor([3.0, 50.0, 2.0, 4.0])
    strategy = SimpleNamespace(all_gather=lambda values: torch.stack([values, other]))
    trainer = SimpleNamespace(world_size=2, strategy=strategy)
    here = dict(zip(names, [2.0, 30.0, 1.0, math.nan], strict=True))
    merged = over_ranks(trainer, SimpleNamespace(device="cpu"), here)
    assert merged == dict(zip(names, [3.0, 80.0, 1.5, 4.0], strict=True))
