"""Options, variables and settings of other Lightning applications have an effect here, or an answer that names one."""

from types import SimpleNamespace

import pytest
from lightning.pytorch import callbacks

from rlmt.cli import main
from rlmt.cli.checks import check_manual_optimization
from rlmt.cli.lightning_habits import check_lightning_habits, with_default_classes
from rlmt.errors import UserError

TINY = ["fit", "--config", "base", "--config", "grpo", "--config", "tiny"]


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main([*TINY, *args]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlmt: error:")]
    return line


def test_options_of_other_applications_name_the_one_to_use(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--model.optimizer AdamW" in error_of(capsys, "--optimizer", "AdamW")
    for option, instead in (("--optimizer.lr=1", "--model.optimizer"), ("--lr_scheduler", "--model.scheduler")):
        with pytest.raises(UserError, match=instead):
            check_lightning_habits([option], {})
    check_lightning_habits(["--model.optimizer", "optimizer", "--optimizers"], {"PL_GLOBAL_SEED": "1", "PL_FIT": "x"})


def test_variables_of_the_environment_are_refused_with_their_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"PL_FIT__TRAINER__MAX_STEPS: .* --trainer\.max_steps\."):
        check_lightning_habits([], {"PL_FIT__TRAINER__MAX_STEPS": "3"})


@pytest.mark.parametrize("precision", ["16-mixed", "16"])
def test_float16_is_refused_on_every_device(precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--trainer.precision" in (line := error_of(capsys, "--trainer.precision", precision))
    assert "bf16-mixed" in line


def test_help_on_one_class_needs_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--model.algorithm.help", "GRPO"])
    assert "algorithm.kl_coef" in capsys.readouterr().out
    assert with_default_classes(["--model.algorithm.help", "PPO"])[:2] == ["--model", "RLMTModule"]
    assert with_default_classes(["--config", "sft", "--model.x.help"]) == ["--config", "sft", "--model.x.help"]
    assert with_default_classes(["--model", "SFT", "--model.x.help"]) == ["--model", "SFT", "--model.x.help"]
    assert with_default_classes(["--model.help"]) == ["--model.help"]


@pytest.mark.parametrize(
    ("callback", "fix"),
    [
        (callbacks.GradientAccumulationScheduler({0: 2}), "--data.batch_size"),
        (callbacks.StochasticWeightAveraging(0.1), "leave it out"),
        (callbacks.WeightAveraging(), "leave it out"),
        (callbacks.EMAWeightAveraging(), "leave it out"),
        (callbacks.LearningRateFinder(), "--model.optimizer.lr"),
        (callbacks.BatchSizeFinder(), "rlmt plan"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_callbacks_that_take_optimizer_steps_or_change_weights_are_refused(
    callback: callbacks.Callback, fix: str
) -> None:
    options = SimpleNamespace(accumulate_grad_batches=1, gradient_clip_val=None)
    with pytest.raises(UserError, match=rf"--trainer.callbacks {type(callback).__name__}: .*{fix}.*\.$"):
        check_manual_optimization(SimpleNamespace(**vars(options), callbacks=[callbacks.Timer(), callback]))
    check_manual_optimization(SimpleNamespace(**vars(options), callbacks=callbacks.Timer()))
