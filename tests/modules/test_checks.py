"""Unsupported strategies are refused in one line, before any model is loaded."""

from types import SimpleNamespace
from typing import Any

import pytest
from bitsandbytes.optim import AdamW8bit
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.optim import AdamW

from rlmt.algorithms import GRPO, PPO, Algorithm
from rlmt.distributed.fsdp2 import FSDP2
from rlmt.engines import TransformersEngine, VLLMEngine, VLLMServerEngine
from rlmt.engines.base import Engine
from rlmt.errors import UserError
from rlmt.models.adapters import LoRA
from rlmt.models.quantization import NF4
from rlmt.modules.checks import check_sharded_run, check_trainer


def trainer(strategy: Any = None, engine: Engine | None = None, world_size: int = 2, module: Any = None) -> Any:
    return SimpleNamespace(
        strategy=strategy or DDPStrategy(),
        world_size=world_size,
        datamodule=SimpleNamespace(engine=engine or TransformersEngine(), val_engine=None),
        lightning_module=module,
        precision="32-true",
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
