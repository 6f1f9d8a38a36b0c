"""Runs that stop and resume within epochs, between them and before a validation, once or many times."""

from __future__ import annotations

import csv
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from rlmt.callbacks import PolicyCheckpoint
from rlmt.checkpointing import AtomicCheckpointIO, ResumableCSVLogger, StoppedBySignal
from rlmt.data.sampler import PromptSampler

STEPS = 9
"""Steps of a run: two epochs of four and one of the third; every third step is followed by a validation."""


class Rows(Dataset[int]):
    keys = list(range(9))

    def fingerprint(self) -> str:
        return "rows"

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, position: int) -> int:
        return self.keys[position]


class Data(LightningDataModule):
    def setup(self, stage: str) -> None:
        self.sampler = PromptSampler(Rows(), 2, 1, 0, seed=3)

    def train_dataloader(self) -> Any:
        return StatefulDataLoader(
            self.sampler.dataset, 2, sampler=self.sampler, drop_last=True, generator=torch.Generator()
        )

    def val_dataloader(self) -> Any:
        return DataLoader(Rows(), 3, generator=torch.Generator())

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)


class Module(LightningModule):
    """Two optimizer steps on each batch; what it logs depends on all random numbers before."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        for _ in range(2):
            loss = (self.weight - batch - torch.rand(2)).square().sum()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("loss", loss, on_step=True, on_epoch=False)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/weight", self.weight.sum() + batch.float().mean(), batch_size=len(batch))

    def resume_state(self) -> dict[str, Any]:
        return {"random": [torch.get_rng_state()]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        torch.set_rng_state(checkpoint["rlmt"]["random"][0])


class Interrupt(Callback):
    """Sends this process SIGTERM once, in the named hook at the numbered step."""

    def __init__(self, hook: str, step: int) -> None:
        self.step, self.sent = step, False
        setattr(self, hook, self.hook)

    def hook(self, trainer: Trainer, *args: Any, **options: Any) -> None:
        if not self.sent and trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1 >= self.step:
            self.sent = True
            signal.raise_signal(signal.SIGTERM)


class Keep(AtomicCheckpointIO):
    """Keeps a copy of each checkpoint."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        if self.folder is not None:
            shutil.copy(path, self.folder / f"{checkpoint['run']['step']}.ckpt")


def run(
    folder: Path, start: Path | None = None, keep: Path | None = None, stop: Callback | None = None, **options: Any
) -> dict[str, Any]:
    """Trains in a folder; returns the end of its log and states, or the step of the checkpoint where it stopped."""
    if keep is not None:
        keep.mkdir()
    torch.manual_seed(0)
    log = ResumableCSVLogger(folder)
    if start is not None:
        log.resume(0, torch.load(start, weights_only=True)["run"]["step"])
    checkpoint = PolicyCheckpoint(every_n_steps=1000 if stop else 1, dirpath=str(folder / "checkpoints"))
    trainer = Trainer(
        **{"max_steps": 2 * STEPS, "max_epochs": -1} | options,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        callbacks=[*([stop] if stop else []), checkpoint],
        logger=[log],
        plugins=[Keep(keep)],
        log_every_n_steps=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module = Module()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        trainer.fit(module, datamodule=Data(), ckpt_path=start, weights_only=True)
    except StoppedBySignal as stopped:
        assert stopped.code == 143 and signal.getsignal(signal.SIGTERM) is handler
        return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    with (folder / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    epochs = state["loops"]["fit_loop"]["epoch_progress"]
    return {
        "rows": rows,
        "weight": module.weight.tolist(),
        "moments": [t.tolist() for t in state["optimizer_states"][0]["state"][0].values()],
        "random": [one.tolist() for one in state["rlmt"]["random"]],
        "drawn": state["Data"],
        "epochs": epochs,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The uninterrupted run, with a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("whole")
    ended = run(folder / "run", keep=folder / "kept")
    assert [row["epoch"] for row in ended["rows"] if row["loss"]] == ["0"] * 4 + ["1"] * 4 + ["2"]
    assert [row["step"] for row in ended["rows"] if row["val/weight"]] == ["2", "5", "8"]
    return ended, folder / "kept"


def test_run_resumed_from_every_step_equals_the_uninterrupted_run(
    whole: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    ended, kept = whole
    for step in range(STEPS - 1):
        folder = tmp_path / str(step)
        shutil.copytree(kept.parent / "run", folder)
        assert run(folder, kept / f"{step}.ckpt") == ended, step


def test_run_resumed_many_times_equals_the_uninterrupted_run(
    whole: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """Kills the run after each step: errors in counts would add up."""
    ended, kept = whole
    folder, start = tmp_path / "run", kept / "0.ckpt"
    shutil.copytree(kept.parent / "run", folder)
    for step in range(1, STEPS):
        again = run(folder, start, keep=tmp_path / f"kept{step}")
        assert again == ended, step
        start = tmp_path / f"kept{step}" / f"{step}.ckpt"


@pytest.mark.parametrize(
    ("hook", "step", "saved"),
    [
        ("on_train_batch_start", 1, 0),  # as during generation: stops at once, after the previous step
        ("on_train_batch_start", 4, 3),  # after the end of an epoch
        ("on_before_backward", 5, 5),  # between two optimizer steps: stops after the step and its validation
        ("on_validation_batch_start", 2, 2),  # within a validation, which is repeated
        ("on_validation_end", 5, 5),
        ("on_train_batch_end", 3, 3),  # the last step of an epoch
    ],
)
def test_signal_saves_all_completed_steps(
    hook: str, step: int, saved: int, whole: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    ended, _ = whole
    stop = Second(step) if hook == "on_before_backward" else Interrupt(hook, step)
    state = run(tmp_path, stop=stop)
    assert state["run"] == {"version": 0, "step": saved}
    assert run(tmp_path, tmp_path / "checkpoints" / "last.ckpt") == ended


class Second(Interrupt):
    """Sends the second signal between the two optimizer steps."""

    def __init__(self, step: int) -> None:
        super().__init__("on_before_backward", step)
        self.calls = 0

    def hook(self, trainer: Trainer, *args: Any, **options: Any) -> None:
        self.calls += trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1 == self.step
        if self.calls == 2:
            super().hook(trainer)


def test_second_signal_stops_within_the_step(tmp_path: Path) -> None:
    """Between two optimizer steps no checkpoint can be written."""

    class Twice(Second):
        def hook(self, trainer: Trainer, *args: Any, **options: Any) -> None:
            super().hook(trainer)
            if self.sent:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(FileNotFoundError, match=r"last\.ckpt"):  # StoppedBySignal, without a checkpoint
        run(tmp_path, stop=Twice(5))


def test_epoch_counts_are_right_when_epochs_end_the_run(tmp_path: Path) -> None:
    """Resumed at the end of each epoch, a run of three epochs has three."""
    options = {"max_steps": -1, "max_epochs": 3}
    ended = run(tmp_path / "whole", keep=tmp_path / "kept", **options)
    assert len([row for row in ended["rows"] if row["loss"]]) == 12
    folder, start = tmp_path / "broken", tmp_path / "kept" / "3.ckpt"
    shutil.copytree(tmp_path / "whole", folder)
    assert run(folder, start, keep=tmp_path / "again", **options) == ended
    assert run(folder, tmp_path / "again" / "7.ckpt", **options) == ended
