"""A hand-made batch and the smallest module that returns it, as the real one does."""

import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from rlmt.modules.base import TrainingModule
from rlmt.modules.metrics import PROGRESS_BAR, step_metrics
from rlmt.types import Experience, FinishReason, Prompt, RolloutBatch, Sampling, Scores, Split, Status

THOUGHT = [10, 20, 30, 40, 50, 60]
RESPONSE = [1, 2, 3, 4, 5, 0]
REWARDS = [1.0, 2.0, 3.0, 5.0, 5.0, 5.0]


def make_experience(step: int = 0, malformed: bool = False) -> Experience:
    """Two prompts of three samples; the last sample never closes its thought. Rewards grow by 1 a step."""
    lengths = [t + r for t, r in zip(THOUGHT, RESPONSE, strict=True)]
    splits = [Split(f"thought {i}", f"response {i}", Status.OK) for i in range(5)]
    splits.append(Split("", "", Status.UNCLOSED))
    scored: list[str | None] = [split.response for split in splits[:5]] + [None]
    classifier = torch.tensor([1.0, 2, 3, 4, 5, math.nan])
    if malformed:
        splits, scored, classifier = [Split("", "", Status.UNCLOSED)] * 6, [None] * 6, torch.full((6,), math.nan)
    texts = [f"<think>{s.thought}</think>{s.response}" if s.ok else "<think>never \x1b[31mends" for s in splits]
    rollouts = RolloutBatch(
        prompts=[Prompt(7, [{"role": "user", "content": "first [bold]question[/]"}])]
        + [Prompt(9, [{"role": "system", "content": "be kind"}, {"role": "user", "content": "second question"}])],
        group_size=3,
        prompt_ids=[[1, 2], [3, 4, 5]],
        completion_ids=[list(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths)],
        engine_logprobs=-torch.arange(sum(lengths)) / 7,
        finish=[FinishReason.STOP] * 5 + [FinishReason.LENGTH],
        sampling=Sampling(temperature=0.7, max_new_tokens=60, stop=("</response>",), stop_token_ids=(2, 3), top_p=0.9),
        weight_version=step,
        epoch=1,
    )
    return Experience(
        rollouts=rollouts,
        texts=texts,
        splits=splits,
        thought_tokens=torch.tensor(THOUGHT),
        scores=Scores(
            torch.tensor(REWARDS) + step, {"classifier": classifier + step, "none": torch.full((6,), math.nan)}, scored
        ),
        group=torch.tensor([0, 0, 0, 1, 1, 1]),
        lengths=torch.tensor(lengths),
        engine_logprobs=rollouts.engine_logprobs,
    )


@dataclass
class FakeFormat:
    name: str = "think"

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name}


class FakeModule(LightningModule):
    """Logs as RLMTModule does. Two optimizer steps per rollout, so that `global_step` is ahead of the rollout steps."""

    log_step = TrainingModule.log_step

    def __init__(self, malformed: bool = False, metrics: dict[str, float] | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.format = FakeFormat()
        self.malformed = malformed
        self.metrics = metrics or {}
        self.before_step: Callable[[int], None] = lambda step: None

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
        step = int(batch)
        self.before_step(step)
        for _ in range(2):
            self.optimizers().step()
        experience = make_experience(step, self.malformed)
        metrics = step_metrics(experience, experience) | {"policy/kl": 0.001 * (step + 1), "policy/entropy": 2.0}
        self.log_step(metrics | self.metrics, len(experience.rollouts), PROGRESS_BAR)
        return {"experience": experience, "metrics": metrics | self.metrics}

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
        self.log("val/reward_mean", 0.5, batch_size=6)
        return {"experience": make_experience()}

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
        self.before_step(int(batch))
        return {"experience": make_experience(int(batch))}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Loader:
    """Batches 0, 1, …, each the number of its rollout step; goes on where a checkpoint left it."""

    def __init__(self, batches: int) -> None:
        self.batches, self.at = batches, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < self.batches:
            self.at += 1
            yield torch.tensor(self.at - 1)
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def make_trainer(folder: Path, callbacks: list[Callback], **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "logger": CSVLogger(folder, name=None, version=""),
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=callbacks, **(defaults | options))


def fit(
    folder: Path, callbacks: list[Callback], steps: int = 2, module: FakeModule | None = None, **options: Any
) -> Trainer:
    ckpt_path, loaders = options.pop("ckpt_path", None), [Loader(steps)]
    if options.pop("validate", False):
        loaders.append(DataLoader(torch.arange(2), batch_size=1))
    trainer = make_trainer(folder, callbacks, **options)
    trainer.fit(module or FakeModule(), *loaders, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def read_csv(folder: Path) -> list[dict[str, float]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.fixture
def world() -> Any:
    """What the tests of callbacks build on; test folders are no packages, so they cannot import it."""
    from types import SimpleNamespace

    return SimpleNamespace(
        experience=make_experience, Module=FakeModule, Loader=Loader, fit=fit, trainer=make_trainer, csv=read_csv
    )
