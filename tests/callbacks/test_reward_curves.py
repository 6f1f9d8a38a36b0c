"""curves.png: written at the end, on every kind of interruption, and whole after a resumed run."""

import contextlib
import math
import os
import signal
import struct
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.axes import Axes

from rlmt.callbacks import RewardCurves
from rlmt.errors import UserError
from rlmt.report.curves import draw_curves, smooth


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:])


def interrupt(step_to_fail, action):
    def before_step(step):
        if step == step_to_fail:
            action()

    return before_step


def boom():
    raise RuntimeError("boom")


def ctrl_c():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_picture_is_drawn_at_the_end(world, tmp_path):
    world.fit(tmp_path, [RewardCurves(every_n_steps=0)])
    assert png_size(tmp_path / "curves.png") == (1650, 1110)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.csv"]


def test_the_picture_is_drawn_on_the_way(world, tmp_path):
    seen = []
    module = world.Module()
    module.before_step = lambda step: seen.append((tmp_path / "curves.png").exists())
    world.fit(tmp_path, [RewardCurves(every_n_steps=2)], steps=4, module=module)
    assert seen == [False, False, True, True]


@pytest.mark.parametrize("action", [boom, ctrl_c, terminate])
def test_an_interrupted_run_leaves_its_picture(world, tmp_path, action):
    module, curves = world.Module(), RewardCurves()
    module.before_step = interrupt(2, action)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(RuntimeError if action is boom else SystemExit):
            world.fit(tmp_path, [curves], steps=5, module=module)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from the first Ctrl+C on
    assert (tmp_path / "curves.png").is_file()
    assert curves.state_dict()["train"]["step"][:2] == [0, 1]


def test_a_failure_before_the_first_step_leaves_no_picture(world, tmp_path):
    module = world.Module()
    module.before_step = interrupt(0, boom)
    with pytest.raises(RuntimeError, match="boom"):
        world.fit(tmp_path, [RewardCurves()], module=module)
    assert not (tmp_path / "curves.png").exists()


def test_a_resumed_run_has_the_whole_curve(world, tmp_path):
    def run(folder, module, **options):
        curves = RewardCurves()
        saving = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="at-{step}")
        options |= {"validate": True, "val_check_interval": 2, "enable_checkpointing": True}
        with contextlib.suppress(RuntimeError):
            world.fit(folder, [curves, saving], steps=6, module=module, **options)
        return curves.state_dict()

    def module():
        return world.Module(metrics={"dpo/accuracy": 0.75})

    whole = run(tmp_path / "whole", module())
    broken = module()
    broken.before_step = interrupt(3, boom)
    run(tmp_path / "broken", broken)
    (checkpoint,) = (tmp_path / "broken").glob("*step=6.ckpt")  # three rollouts of two optimizer steps
    resumed = run(tmp_path / "resumed", module(), ckpt_path=checkpoint)
    assert whole["train"]["step"] == [0, 1, 2, 3, 4, 5]
    assert whole["train"]["reward/mean"] == [3.5 + step for step in range(6)]
    assert whole["train"]["policy/kl"] == pytest.approx([0.001 * (step + 1) for step in range(6)])
    assert whole["validation"] == {"step": [1, 3, 5], "reward": [0.5] * 3}
    assert resumed == whole


def test_held_out_rewards_join_the_curves_and_the_picture(world, tmp_path):
    class Module(world.Module):
        held_out = SimpleNamespace(names=["second"])

        def validation_step(self, batch, batch_idx):
            self.log("val/second", 2.5, batch_size=6)
            return super().validation_step(batch, batch_idx)

    plain, curves = RewardCurves(every_n_steps=0), RewardCurves(every_n_steps=0)
    options = {"validate": True, "val_check_interval": 1}
    world.fit(tmp_path / "plain", [plain], steps=2, **options)
    curves.load_state_dict(plain.state_dict())  # goes on with a held-out reward that the run did not have before
    world.fit(tmp_path / "validated", [curves], steps=1, module=Module(), **options)
    validated = curves.state_dict()["validation"]
    assert validated["reward"] == [0.5] * 3
    assert validated["val/second"] == pytest.approx([math.nan, math.nan, 2.5], nan_ok=True)
    assert png_size(tmp_path / "validated" / "curves.png") == (1650, 1110)


def test_the_picture_marks_the_best_validation_of_a_held_out_reward(tmp_path, monkeypatch):
    words = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **options: words.append(s))
    train = {name: [0.0, 1.0, 2.0] for name in RewardCurves().state_dict()["train"]}
    held_out = {"val/second": [math.nan, 4.0, 3.0], "val/unheard": [math.nan] * 3}
    draw_curves(tmp_path / "c.png", train, {"step": [0, 1, 2], "reward": [1.0, 2.0, 3.0], **held_out}, "")
    assert "second\nbest: step 1" in words
    assert not any("unheard" in word for word in words)


def test_a_dry_run_leaves_nothing(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world.fit(tmp_path, [RewardCurves()], fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_smoothing_is_the_gaussian_mean_of_known_neighbours():
    steps, values = np.array([0.0, 1, 2, 10]), np.array([1.0, math.nan, 3.0, 7.0])
    weight = math.exp(-0.5 * 2**2)
    expected = [(1 + 3 * weight) / (1 + weight), math.nan, (3 + weight) / (1 + weight), 7.0]
    np.testing.assert_allclose(smooth(steps, values, 1.0), expected)
    np.testing.assert_allclose(smooth(steps, np.full(4, 2.5), 3.0), 2.5)


@pytest.mark.parametrize(("accuracy", "drawn"), [([0.5, math.nan, 0.75], "accuracy"), ([math.nan] * 3, "KL")])
def test_pairs_have_their_accuracy_in_the_place_of_the_kl(tmp_path, monkeypatch, accuracy, drawn):
    written = []
    monkeypatch.setattr(Axes, "text", lambda axes, x, y, text, **style: written.append(text))
    train = {name: [0.25] * 3 for name in RewardCurves().state_dict()["train"]} | {"step": [0, 1, 2]}
    train |= {"policy/kl": [math.nan if drawn == "accuracy" else 0.1] * 3, "dpo/accuracy": accuracy}
    draw_curves(tmp_path / "c.png", train, {"step": [], "reward": []}, "")
    assert {"KL", "accuracy"} & set(written) == {drawn}
    assert "not measured" not in written


def test_a_run_without_kl_and_of_one_step_draws(tmp_path):
    curves = RewardCurves().state_dict()
    train = {name: [math.nan if name.startswith(("policy/", "dpo/")) else 0.0] for name in curves["train"]}
    path = draw_curves(tmp_path / "new" / "c.png", train, {"step": [], "reward": []}, "costs $5 and $6 _ ^")
    assert plt.get_fignums() == [], "pyplot's global figures are other code's"
    assert png_size(path) == (1650, 1110)


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_bad_interval(value):
    with pytest.raises(UserError, match="RewardCurves.every_n_steps"):
        RewardCurves(every_n_steps=value)


def test_state_survives_safe_loading(tmp_path):
    torch.save(RewardCurves().state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == RewardCurves().state_dict()
