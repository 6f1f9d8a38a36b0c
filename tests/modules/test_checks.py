"""Runs on several processes that cannot be had are refused in one line, before any model is loaded."""

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
        algorithm=algorithm or GRPO(), quantization=quantization, lora=quantization and LoRA(), _optimizer=optimizer
    )


def servers() -> VLLMServerEngine:
    return VLLMServerEngine(urls=["http://127.0.0.1:8001"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (trainer(ModelParallelStrategy()), r"--trainer\.strategy is ModelParallelStrategy: .*--config ddp"),
        (trainer(FSDP2(), module=plain(quantization=NF4())), r"--model\.quantization: .*--config ddp"),
        (trainer(FSDP2(), module=plain(PPO(critic_shared=True))), r"critic_shared: .*leave the option out"),
        (trainer(FSDP2(), module=plain(optimizer=AdamW8bit)), r"optimizer AdamW8bit: .*torch\.optim\.AdamW"),
        (trainer(FSDP2(), module=plain()), r"TransformersEngine samples with the policy itself.*VLLMEngine"),
    ],
)
def test_what_cannot_be_spread_is_refused(given: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        check_trainer(given)
        check_sharded_run(given)
    assert "\n" not in str(caught.value)


def test_what_can_be_spread_passes() -> None:
    check_sharded_run(trainer())
    check_sharded_run(trainer(FSDP2(), VLLMEngine(), module=plain(PPO())))
    check_sharded_run(trainer(FSDP2(), servers(), module=plain()))
    check_sharded_run(trainer(ModelParallelStrategy(), servers(), world_size=1))


def test_a_run_without_engines_asks_for_less() -> None:
    """SFT and reward models: their data modules have none."""
    bare: Any = SimpleNamespace(quantization=None, lora=None, _optimizer=AdamW)
    for strategy in (DDPStrategy(), FSDP2()):
        check_trainer(trainer(strategy, module=bare))
    bare.quantization = NF4()
    check_trainer(trainer(DDPStrategy(), module=bare))
    with pytest.raises(UserError, match=r"--model\.quantization: .*--config ddp"):
        check_trainer(trainer(FSDP2(), module=bare))
    bare.quantization, bare.optimizer_factory = None, AdamW8bit
    check_trainer(trainer(DDPStrategy(), module=bare))
    with pytest.raises(UserError, match=r"optimizer AdamW8bit"):
        check_trainer(trainer(FSDP2(), module=bare))
