"""rlmt from Python: the metrics of the trainer, a module from a checkpoint, prediction, hyper-parameters."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR

from rlmt.algorithms import GRPO
from rlmt.callbacks import PolicyCheckpoint
from rlmt.data import PreferenceDataModule, RolloutDataModule
from rlmt.engines import TransformersEngine
from rlmt.errors import UserError
from rlmt.models import LoRA
from rlmt.modules import SFT, RewardModeling, RLMTModule
from rlmt.rewards import LengthWindow, Reward

OPTIONS: dict[str, Any] = {"reward": LengthWindow(5, 20, 40), "algorithm": GRPO(kl_coef=0.0)}


def data(prompts: Path) -> RolloutDataModule:
    sizes = {"batch_size": 2, "group_size": 2, "max_prompt_tokens": 256, "max_new_tokens": 8, "val_size": 2}
    return RolloutDataModule(str(prompts), TransformersEngine(), **sizes)  # type: ignore[arg-type]


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    logger = CSVLogger(folder, name=None, version="")
    return Trainer(logger=logger, max_epochs=-1, num_sanity_val_steps=0, log_every_n_steps=1, **quiet, **options)


@pytest.fixture(scope="module")
def run(tiny: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RLMTModule, Trainer, Path]:
    """Two steps from Python, with a LoRA adapter and a schedule."""
    folder = tmp_path_factory.mktemp("run")
    schedule = partial(LinearLR, start_factor=0.5, total_iters=2)
    module = RLMTModule(
        str(tiny / "policy"),
        format="no_think",
        optimizer=partial(AdamW, lr=1e-2),
        scheduler=schedule,  # type: ignore[arg-type]
        lora=LoRA(rank=2),
        **OPTIONS,
    )
    fitted = trainer(folder, max_steps=2, callbacks=[PolicyCheckpoint(dirpath=str(folder))])
    fitted.fit(module, data(prompts_file))
    return module, fitted, folder / "last.ckpt"


def test_callback_metrics_and_learning_rate_are_those_of_the_last_step(run: Any) -> None:
    _, fitted, checkpoint = run
    with (checkpoint.parent / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["policy/skipped"] == "0.0"]
    rates = [float(row["policy/lr"]) for row in rows]
    assert rates == pytest.approx([0.5e-2, 0.75e-2])  # factors 0.5 and (0.5 + 1) / 2
    assert float(fitted.callback_metrics["policy/lr"]) == pytest.approx(0.75e-2)
    assert {"reward/mean", "policy/grad_norm", "length/response_mean"} <= fitted.callback_metrics.keys()


class SecondBatchIsEqual(Reward):
    """Different rewards for the samples of a prompt, except in the second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def score(self, prompts: Any, responses: Any, statuses: Any) -> torch.Tensor:
        self.batches += 1
        return torch.arange(len(responses), dtype=torch.float32) * (self.batches != 2)


def test_skipped_batch_logs_no_metrics_of_an_earlier_update(tiny: Path, prompts_file: Path, tmp_path: Path) -> None:
    options = {"reward": SecondBatchIsEqual(), "algorithm": GRPO(), "malformed": None}
    module = RLMTModule(str(tiny / "policy"), format="no_think", **options)  # type: ignore[arg-type]
    trainer(tmp_path, max_steps=2).fit(module, data(prompts_file))
    with (tmp_path / "metrics.csv").open() as file:
        first, second, third = csv.DictReader(file)
    assert [row["policy/skipped"] for row in (first, second, third)] == ["0.0", "1.0", "0.0"]
    logged = {name for name, value in second.items() if value}
    update = {name for name, value in third.items() if value} - logged
    assert {"policy/loss", "policy/kl", "policy/grad_norm", "engine/mismatch_kl"} <= update
    assert {"reward/mean", "policy/lr", "time/step_s"} <= logged and first.keys() >= update
    assert all(first[name] for name in update)


def test_module_from_a_checkpoint_has_the_trained_policy_and_predicts(
    run: Any, prompts_file: Path, tmp_path: Path
) -> None:
    trained, _, checkpoint = run
    module = RLMTModule.load_from_checkpoint(checkpoint, lora=LoRA(rank=2), **OPTIONS)
    assert module.format.name == "no_think" and not module.training
    state = trained.state_dict()
    assert state.keys() == module.state_dict().keys() and any("lora" in name for name in state)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    predictions = trainer(tmp_path).predict(module, data(prompts_file))
    assert predictions is not None and len(predictions) == 12  # 24 prompts, two a batch
    assert len(predictions[0]["experience"].texts) == 4  # type: ignore[index, call-overload]
    (results,) = trainer(tmp_path).validate(module, data(prompts_file), verbose=False)
    assert "val/reward_mean" in results
    with pytest.raises(UserError, match="ckpt_path=CHECKPOINT"):
        trainer(tmp_path, max_steps=1).fit(module, data(prompts_file))


def test_checkpoint_without_options_names_what_is_missing(run: Any) -> None:
    with pytest.raises(UserError, match=r"last.ckpt: .*reward and algorithm"):
        RLMTModule.load_from_checkpoint(run[2])
    with pytest.raises(UserError, match="is a checkpoint of RLMTModule"):
        SFT.load_from_checkpoint(run[2])


def test_reward_model_from_a_checkpoint_has_the_trained_weights_and_tests(
    tiny: Path, preferences: Path, tmp_path: Path
) -> None:
    def comparisons() -> PreferenceDataModule:
        return PreferenceDataModule(str(preferences), batch_size=4, val_size=4, max_length=256)

    trained = RewardModeling(str(tiny / "policy"), optimizer=partial(AdamW, lr=1e-2), lora=LoRA(rank=2))
    fitted = trainer(tmp_path, max_steps=2, callbacks=[PolicyCheckpoint(dirpath=str(tmp_path))])
    fitted.fit(trained, comparisons())
    (expected,) = fitted.validate(trained, comparisons(), verbose=False)

    module = RewardModeling.load_from_checkpoint(tmp_path / "last.ckpt", lora=LoRA(rank=2))
    state = trained.state_dict()
    assert state.keys() == module.state_dict().keys() and not module.training
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    (found,) = trainer(tmp_path / "again").validate(module, comparisons(), verbose=False)
    assert found == pytest.approx(expected)
    with pytest.raises(UserError, match="ckpt_path=CHECKPOINT"):
        trainer(tmp_path / "fit", max_steps=1).fit(module, comparisons())
