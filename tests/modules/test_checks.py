"""Unsupported strategies are refused in one line, before any model is loaded."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from bitsandbytes.optim import AdamW8bit
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.optim import AdamW
from transformers import LlamaConfig

from rlmt.algorithms import GRPO, PPO, Algorithm
from rlmt.distributed.fsdp2 import FSDP2
from rlmt.engines import TransformersEngine, VLLMEngine, VLLMServerEngine
from rlmt.engines.base import Engine
from rlmt.errors import UserError
from rlmt.models.adapters import LoRA
from rlmt.models.quantization import NF4
from rlmt.modules.checks import check_engines, check_sharded_run, check_trainer


def trainer(strategy: Any = None, engine: Engine | None = None, world_size: int = 2, module: Any = None) -> Any:
    return SimpleNamespace(
        strategy=strategy or DDPStrategy(),
        accelerator=CPUAccelerator(),
        world_size=world_size,
        datamodule=SimpleNamespace(engine=engine or TransformersEngine(), val_engine=None),
        lightning_module=module,
        precision="32-true",
        state=SimpleNamespace(fn="validate"),
    )


def plain(algorithm: Algorithm | None = None, quantization: NF4 | None = None, optimizer: Any = AdamW) -> Any:
    return SimpleNamespace(
        algorithm=algorithm or GRPO(),
        quantization=quantization,
        lora=quantization and LoRA(),
        optimizer_factory=optimizer,
    )


def check(trainer: Any) -> None:
    """Both checks of an RL run."""
    check_trainer(trainer)
    engine, module = trainer.datamodule.engine, trainer.lightning_module
    check_sharded_run(trainer, None if module is None else module.algorithm.critic, [engine])


def servers() -> VLLMServerEngine:
    return VLLMServerEngine(urls=["http://127.0.0.1:8001"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (trainer(ModelParallelStrategy()), r"--trainer\.strategy is ModelParallelStrategy, .*--config ddp"),
        (trainer(FSDP2(), module=plain(quantization=NF4())), r"--model\.quantization: .*--config ddp"),
        (
            trainer(FSDP2(bf16_residual=True), module=plain()),
            r"bf16_residual is true, but --trainer\.precision is 32-true",
        ),
        (trainer(FSDP2(), module=plain(PPO(critic_shared=True))), r"critic_shared: .*Leave the option out"),
        (trainer(FSDP2(), module=plain(optimizer=AdamW8bit)), r"optimizer is AdamW8bit: .*torch\.optim\.AdamW"),
        (trainer(FSDP2(), module=plain()), r"TransformersEngine, which generates with the policy itself.*VLLMEngine"),
    ],
)
def test_unsupported_strategy_is_refused(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check(given)
    assert "\n" not in str(caught.value)


def test_supported_strategy_passes() -> None:
    check(trainer())
    check(trainer(FSDP2(), VLLMEngine(), module=plain(PPO())))
    check(trainer(FSDP2(), servers(), module=plain()))
    check(trainer(ModelParallelStrategy(), servers(), world_size=1))


def test_supervised_runs_need_only_the_trainer_check() -> None:
    """SFT and reward models: their data modules have none."""
    bare: Any = SimpleNamespace(quantization=None, lora=None, optimizer_factory=AdamW)
    for strategy in (DDPStrategy(), FSDP2()):
        check_trainer(trainer(strategy, module=bare))
    bare.quantization = NF4()
    check_trainer(trainer(DDPStrategy(), module=bare))
    with pytest.raises(UserError, match=r"--model\.quantization: .*--config ddp"):
        check_trainer(trainer(FSDP2(), module=bare))
    bare.quantization, bare.optimizer_factory = None, AdamW8bit
    check_trainer(trainer(DDPStrategy(), module=bare))
    with pytest.raises(UserError, match=r"optimizer is AdamW8bit"):
        check_trainer(trainer(FSDP2(), module=bare))


def test_second_vllm_in_a_process_is_refused() -> None:
    with pytest.raises(UserError, match=r"--data\.val_engine is a second VLLMEngine.*leave the option out"):
        check_engines([VLLMEngine(), VLLMEngine()], LlamaConfig(), None)
    check_engines([servers(), VLLMEngine()], LlamaConfig(), None)


@pytest.mark.parametrize(
    ("accelerator", "precision", "warns"),
    [(CUDAAccelerator, "32-true", True), (CUDAAccelerator, "bf16-mixed", False), (CPUAccelerator, "32-true", False)],
)
def test_float32_on_a_gpu_is_warned_about(accelerator: Any, precision: str, warns: bool) -> None:
    given = trainer(world_size=1)
    given.accelerator, given.precision = accelerator(), precision
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_trainer(given)
    assert ["--trainer.precision is 32-true on a GPU" in str(w.message) for w in caught] == [True] * warns
