"""The lines at the end of a run, and the table of `rlmt validate`."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rlmt.callbacks import RewardCurves, RunSummary
from rlmt.callbacks.run_summary import _change, wrapped


@pytest.fixture
def module(world):
    module = world.Module()
    module.kind = "RLMTModule"
    validations = []

    def validation_step(batch, batch_idx):
        validations.append(batch_idx)
        values = torch.tensor([0.0, 1, 2]) + (len(validations) - 1) // 2
        module.log("val/reward_mean", values.mean(), batch_size=3)
        module.log("val/thought_tokens", 10 * values.mean(), batch_size=3)
        return {"experience": world.experience(), "values": {"reward_mean": values, "thought_tokens": 10 * values}}

    module.validation_step = validation_step
    return module


HALF = 2.5706 * math.sqrt(0.8) / math.sqrt(6)
"""Six values 0 0 1 1 2 2: standard deviation sqrt(4/5), Student's t for 5 degrees of freedom at 97.5 %."""


def test_last_lines_state_change_files_and_next_command(world, module, tmp_path, capsys):
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, filename="last")
    options = {"validate": True, "val_check_interval": 2, "enable_checkpointing": True}
    world.fit(tmp_path, [RewardCurves(), RunSummary(), checkpoint], steps=4, module=module, **options)
    *_, steps, reward, thought, response, files, following = capsys.readouterr().out.splitlines()
    assert steps.startswith("steps     4 of 4, in ")
    assert reward == f"reward    1 ± {HALF:.3g} at step 2 → 2 ± {HALF:.3g} at step 4 (validation)"
    assert thought == f"thought   10 ± {10 * HALF:.3g} at step 2 → 20 ± {10 * HALF:.3g} at step 4 tokens (validation)"
    assert response == "response  2.5 at step 1 → 2.5 at step 4 tokens (training)"
    assert files == f"files     {tmp_path}: metrics.csv, curves.png"
    assert following.startswith(f"next      rlmt chat {tmp_path}/checkpoints/last") and following.endswith(".ckpt")


def test_lines_wrap_below_their_text_but_the_next_command_stays_on_its_line():
    files = "files     runs/tiny/run/version_0: metrics.csv, curves.png, cot_length.png, report.html, rollouts"
    following = f"next      rlmt chat {'a-long-folder/' * 9}last.ckpt"
    assert wrapped(["steps     4 of 4, in 9.1 s", files, following], 80) == [
        "steps     4 of 4, in 9.1 s",
        "files     runs/tiny/run/version_0: metrics.csv, curves.png, cot_length.png,",
        "          report.html, rollouts",
        following,
    ]


def test_resumed_run_reports_the_change_since_its_first_step(world, module, tmp_path, capsys):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    options = {"validate": True, "val_check_interval": 1, "enable_checkpointing": True}
    world.fit(tmp_path, [RunSummary(), saving], steps=3, module=module, **options)
    capsys.readouterr()
    world.fit(tmp_path, [RunSummary()], steps=4, module=module, ckpt_path=tmp_path / "step=4.ckpt", **options)
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert "since step 2" in lines["steps"]
    assert lines["reward"].startswith("1 ± ") and "at step 1 → " in lines["reward"] and "at step 4" in lines["reward"]


def test_failed_and_dry_runs_print_no_files(world, tmp_path, capsys):
    module = world.Module()
    module.before_step = lambda step: 1 / 0 if step == 1 else None
    with pytest.raises(ZeroDivisionError):
        world.fit(tmp_path, [RunSummary()], steps=3, module=module)
    assert "steps" not in capsys.readouterr().out
    world.fit(tmp_path, [RunSummary()], steps=3, fast_dev_run=True)
    assert "files" not in (text := capsys.readouterr().out) and "steps" in text


def test_validate_prints_rounded_means_with_intervals(world, module, tmp_path, capsys):
    trainer = world.trainer(tmp_path, [RunSummary()])
    trainer.validate(module, torch.utils.data.DataLoader(torch.arange(2), batch_size=1), verbose=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["val/reward_mean", "1", "±", f"{HALF:.3g}"] in lines
    assert ["val/thought_tokens", "10", "±", f"{10 * HALF:.3g}"] in lines


def test_interval_of_a_mean_over_tokens_has_rows_as_its_units(world, tmp_path, capsys):
    module = world.Module()

    def validation_step(batch, batch_idx):
        sums_and_tokens = torch.tensor([[2.0, 1.0], [9.0, 3.0]])[int(batch)].unsqueeze(0)
        module.log("val/loss", 2.75, batch_size=1)
        return {"values": {"loss": sums_and_tokens}}

    module.validation_step = validation_step
    trainer = world.trainer(tmp_path, [RunSummary()])
    trainer.validate(module, torch.utils.data.DataLoader(torch.arange(2), batch_size=1), verbose=False)
    # R = 11 / 4, residuals 2 - R and 9 - 3R over the mean of 2 tokens: ∓0.375; Student's t for 1 degree of freedom.
    half = 12.7062 * 0.375
    assert ["val/loss", "2.75", "±", f"{half:.3g}"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_brackets_in_names_of_metrics_are_printed(world, tmp_path, capsys):
    module = world.Module()
    module.validation_step = lambda batch, batch_idx: module.log("val/[bold]polite[/x]", 0.5, batch_size=1)
    trainer = world.trainer(tmp_path, [RunSummary()])
    trainer.validate(module, torch.utils.data.DataLoader(torch.arange(2), batch_size=1), verbose=False)
    assert ["val/[bold]polite[/x]", "0.5"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_change_of_a_single_point_is_the_point():
    assert _change([(3, 0.123456, None)]) == "0.123 at step 3"


def test_supervised_modules_are_exported_next(tmp_path):
    callback = RunSummary()
    checkpoint = ModelCheckpoint()
    checkpoint.best_model_path = "runs/sft/version_0/checkpoints/last.ckpt"
    trainer = SimpleNamespace(
        checkpoint_callbacks=[checkpoint],
        max_steps=2,
        global_step=2,
        max_epochs=-1,
        num_training_batches=1,
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(
                batch_progress=SimpleNamespace(total=SimpleNamespace(processed=2)),
                manual_optimization=SimpleNamespace(
                    optim_step_progress=SimpleNamespace(total=SimpleNamespace(ready=2))
                ),
            )
        ),
    )
    callback._points = {"loss": [(1, 2.0, None), (2, 1.0, None)]}
    *_, loss, following = callback.lines(trainer, SimpleNamespace(kind="SFT"))
    assert loss == "loss      2 at step 1 → 1 at step 2 (training)"
    assert following == "next      rlmt export runs/sft/version_0/checkpoints/last.ckpt runs/sft/version_0/exported"
