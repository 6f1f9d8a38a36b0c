"""Lightning's internals that rlmt uses exist, and Lightning has the minor version that they were read in."""

import inspect
from importlib.metadata import version
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities import device_dtype_mixin
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from rlmt.distributed import lightning_internals as internals


class ManualModule(LightningModule):
    """Takes one optimizer step per batch, as the modules of rlmt do."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(32, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.layer(batch).square().mean())
        optimizer.step()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.layer(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def trainer(tmp_path: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=3,
        limit_val_batches=1,
        logger=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    seen: list[tuple[int, tuple[int, int], bool]] = []
    trainer.seen = seen  # type: ignore[attr-defined]

    class Module(ManualModule):
        def on_train_start(self) -> None:
            internals.add_step_end_hook(trainer, self.on_step_end)

        def on_step_end(self) -> None:
            steps = internals.train_batches_done(trainer)
            seen.append((steps, internals.training_progress(trainer), internals.is_last_step(trainer)))

    trainer.fit(Module(), BoringDataModule())
    return trainer


def test_lightning_has_the_pinned_minor_version() -> None:
    """Before the pin in pyproject.toml is raised, read rlmt.distributed.lightning_internals against the new version."""
    assert version("lightning").split(".")[:2] == ["2", "6"]


def test_step_end_hook_sees_the_progress_of_each_step(trainer: Trainer) -> None:
    assert trainer.seen == [(n, (n, n), n == 6) for n in range(1, 7)]  # type: ignore[attr-defined]


def test_loop_states_have_the_keys_that_are_edited(trainer: Trainer) -> None:
    loops = internals.loops_after_train_batch(trainer)
    fit = loops["fit_loop"]
    counts = {"ready": 6, "completed": 6, "started": 6, "processed": 6}
    batches = fit["epoch_loop.batch_progress"]
    assert batches["total"] == counts and batches["current"].keys() == counts.keys() and batches["is_last_batch"]
    assert fit["epoch_progress"]["total"].keys() == fit["epoch_progress"]["current"].keys() == counts.keys()
    assert fit["epoch_loop.state_dict"]["_batches_that_stepped"] == 6
    assert "state_dict" in fit
    validation = fit["epoch_loop.val_loop.batch_progress"]
    assert validation["current"].keys() == counts.keys() and "is_last_batch" in validation
    assert internals.completed_epochs(loops) == 2

    before = internals.loops_before_validation(loops)
    assert before["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 7
    after = internals.loops_after_step(loops, trainer)
    assert after["fit_loop"]["epoch_loop.batch_progress"]["current"] == dict.fromkeys(counts, 0)


def test_checkpoint_dump_holds_loops_weights_and_optimizer(trainer: Trainer) -> None:
    checkpoint = internals.dump_checkpoint(trainer)
    assert {"epoch", "global_step", "loops", "state_dict", "optimizer_states", "lr_schedulers"} <= checkpoint.keys()


def test_trainer_has_a_cluster_environment(trainer: Trainer) -> None:
    assert isinstance(internals.cluster_environment(trainer), ClusterEnvironment)


def test_device_is_set_without_moving_tensors() -> None:
    assert inspect.signature(device_dtype_mixin._update_properties).parameters.keys() >= {"root", "device"}
    module = ManualModule()
    internals.set_device(module, torch.device("meta"))
    assert module.device.type == "meta" and module.layer.weight.device.type == "cpu"


def test_inference_mode_is_an_attribute_of_the_evaluation_loops(trainer: Trainer) -> None:
    loops = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    assert [loop.inference_mode for loop in loops] == [False, True, True, True]
    internals.disable_inference_mode(trainer)
    assert all(loop.inference_mode is False for loop in loops)


def test_model_parallel_strategy_has_the_attributes_that_are_set() -> None:
    strategy = ModelParallelStrategy()
    assert {"_data_parallel_size", "_tensor_parallel_size", "_process_group_backend"} <= vars(strategy).keys()
    strategy.parallel_devices = [torch.device("cpu")] * 3
    internals.set_data_parallel(strategy)
    internals.set_process_group_backend(strategy, "cpu:gloo,cuda:nccl")
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (3, 1)
    assert strategy.process_group_backend == "cpu:gloo,cuda:nccl"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (ExperimentWriter, "_check_log_dir_exists"),  # rlmt.checkpointing.csv_logger
        (ExperimentWriter, "_rewrite_with_new_header"),
        (LightningCLI, "_get"),  # rlmt.cli.lightning_cli
        (LightningCLI, "_parse_ckpt_path"),
    ],
)
def test_methods_that_subclasses_override_or_call_exist(owner: type, name: str) -> None:
    assert callable(getattr(owner, name))


def test_csv_logger_has_the_attributes_that_are_set(tmp_path: Any) -> None:
    assert {"_experiment", "_version"} <= vars(CSVLogger(tmp_path)).keys()
