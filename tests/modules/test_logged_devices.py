"""Every value that the modules log can be reduced by a backend without CPU tensors, as NCCL is.

The modules are on the meta device here, so a tensor that stayed on the CPU shows.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchmetrics import Metric

from rlmt import modules
from rlmt.algorithms import GRPO
from rlmt.data.supervised import RowBatch
from rlmt.distributed.lightning_internals import set_device
from rlmt.models.micro_batch import no_op_micro_batch
from rlmt.modules import SFT, RewardModeling, RLMTModule
from rlmt.modules.base import TrainingModule
from rlmt.modules.metrics import step_metrics
from rlmt.modules.reward_modeling import PairLoss
from rlmt.rewards import CallableReward
from rlmt.types import Experience, FinishReason, Prompt, RolloutBatch, Sampling, Scores, Split, Status

META = torch.device("meta")
LOG_CALLS: set[tuple[str, int]] = set()
"""File and line of the calls that were checked."""


def nccl_log(module: TrainingModule) -> Callable[..., None]:
    """A replacement of `self.log` that fails where NCCL would."""

    def log(name: str, value: Any, sync_dist: bool = False, **options: Any) -> None:
        frame = sys._getframe(1)
        LOG_CALLS.add((Path(frame.f_code.co_filename).name, frame.f_lineno))
        if isinstance(value, Metric):
            assert not value.sync_on_compute and not sync_dist, name
        elif isinstance(value, torch.Tensor):
            assert value.device == module.device, f"{name} is on {value.device}"
        else:  # Lightning puts numbers on the module's device
            assert isinstance(value, (int, float)), name

    return log


def on_meta(module: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    set_device(module, META)
    monkeypatch.setattr(module, "log", nccl_log(module))
    return module


def scored() -> Experience:
    """Two samples, one malformed, scored by a reward with two parts; all tensors are on the CPU."""
    rollouts = RolloutBatch(
        prompts=[Prompt(0, [{"role": "user", "content": "hi"}])],
        group_size=2,
        prompt_ids=[[1]],
        completion_ids=[[2], [3]],
        engine_logprobs=torch.zeros(2),
        finish=[FinishReason.STOP] * 2,
        sampling=Sampling(1.0, 4),
        weight_version=0,
    )
    parts = {"style": torch.tensor([1.0, float("nan")]), "rubric": torch.tensor([2.0, float("nan")])}
    return Experience(
        rollouts=rollouts,
        texts=["a", "b"],
        splits=[Split("", "a", Status.OK), Split("", "", Status.UNCLOSED)],
        thought_tokens=torch.tensor([0, 1]),
        scores=Scores(total=torch.tensor([1.0, -1.0]), parts=parts, texts=["a", None]),
        group=torch.zeros(2, dtype=torch.long),
        lengths=torch.tensor([1, 1]),
        engine_logprobs=torch.zeros(2),
    )


@pytest.mark.parametrize("stage", ["validation_step", "test_step"])
def test_validation_of_a_reward_with_several_parts(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = [CallableReward("x.held_out")]
    module = on_meta(RLMTModule("unread", CallableReward("x.rule"), GRPO(), held_out_rewards=held_out), monkeypatch)
    monkeypatch.setattr(RLMTModule, "data", SimpleNamespace(generate=lambda prompts, held_out=None: None))
    monkeypatch.setattr(module, "split", lambda rollouts: scored())
    monkeypatch.setattr(module, "ask", lambda experience, held_out: None)
    monkeypatch.setattr(module, "score", lambda experience: experience)
    monkeypatch.setattr(module.held_out, "scores", lambda *_: {"held_out": Scores(torch.ones(2), {}, ["a", None])})
    getattr(module, stage)(None, 0)


def test_training_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    module = on_meta(RLMTModule("unread", CallableReward("x.rule"), GRPO()), monkeypatch)
    experience = scored()
    module.log_step(step_metrics(experience, experience), 2, {"reward/mean": "reward"})


def test_validation_of_supervised_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    sft = on_meta(SFT("unread"), monkeypatch)
    row = SimpleNamespace(sequences=[torch.arange(3)], prompts=[1])
    part = (no_op_micro_batch(torch.device("cpu")), torch.ones(1), torch.ones(()))
    monkeypatch.setattr(sft, "_micro_batches", lambda rows, prompt_weight: iter([part]))
    sft.validation_step(RowBatch([row]), 0)

    reward = RewardModeling("unread")  # on the CPU, where it may log no tensor
    monkeypatch.setattr(reward, "log", nccl_log(on_meta(SFT("unread"), monkeypatch)))
    pairs = torch.ones(2)
    monkeypatch.setattr(
        reward, "losses", lambda rows, regress: iter([PairLoss(pairs.sum(), pairs, pairs, ["a", "a"], [0, 1])])
    )
    reward._subsets = ["a"]
    reward._by_subset.append(type(reward._accuracy)(sync_on_compute=False))
    reward.trainer = SimpleNamespace(testing=False)  # type: ignore[assignment]
    reward.validation_step(RowBatch([]), 0)
    reward.on_validation_epoch_end()


def log_calls() -> Iterator[tuple[str, int]]:
    for file in Path(modules.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.log":
                yield file.name, node.lineno


def test_tests_above_cover_every_log_call() -> None:
    assert LOG_CALLS, "run the whole file"
    assert set(log_calls()) == LOG_CALLS
