"""Options of vLLM that are left to the plan of a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from rlmt.algorithms import GRPO
from rlmt.data import RolloutDataModule
from rlmt.engines import VLLMEngine
from rlmt.errors import UserError
from rlmt.memory.budget import GIB, make_budget
from rlmt.memory.bytes import Parallelism
from rlmt.memory.engine_options import _grant, choose_engine_options
from rlmt.memory.records import Budget, BudgetLine, VLLMShare
from rlmt.modules import RLMTModule
from rlmt.rewards import CallableReward, ClassifierReward, FormatReward, Reward

TOKEN = 2 * 2 * 2 * 64 * 2
"""Bytes of the cache of a token: keys and values of 2 layers with 2 heads of 64, in bfloat16."""
LENGTH = 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders policy/ and reward/ that hold only the config of a small Llama."""
    root = tmp_path_factory.mktemp("shapes")
    shape: dict[str, Any] = {
        **{"hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512, "vocab_size": 4096, "head_dim": 64},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "bfloat16"},
    }
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"]).save_pretrained(root / "policy")
    LlamaConfig(**shape, num_labels=1).save_pretrained(root / "reward")
    return root


def run_of(folder: Path, reward: Reward, **engine: Any) -> tuple[RLMTModule, RolloutDataModule]:
    module = RLMTModule(str(folder / "policy"), reward, GRPO())
    made = VLLMEngine(**engine)
    limits = {"max_prompt_tokens": LENGTH // 2, "max_new_tokens": LENGTH // 2}
    return module, RolloutDataModule("x", made, batch_size=64, group_size=8, **limits)


def chosen(run: tuple[RLMTModule, RolloutDataModule], memory: float | None, ranks: int = 1) -> tuple[float, int]:
    """vLLM's share and the number of samples at once."""
    size = None if memory is None else int(memory * GIB)
    choose_engine_options(*run, torch.bfloat16, size, Parallelism(ranks))
    engine: Any = run[1].engine
    return engine.gpu_memory_utilization, engine.max_num_seqs


@pytest.mark.parametrize(
    ("trainer", "samples", "share"),
    [
        (8, 64, 0.55),  # 12 of 20 GiB are left, and a twentieth of the memory stays free
        (8, 4, 0.45),  # 5 GiB besides the cache, and 1 for each sample
        (8, 1, 0.3),
        (13.8, 64, 0.3),  # 6.2 are left: a cache of one sample, at the expense of what should stay free
        (14.2, 64, 0.2),  # no share fits: the option stays as it is
    ],
)
def test_share_by_hand(trainer: float, samples: int, share: float) -> None:
    lines = [BudgetLine.all_phases("trainer", int(trainer * GIB)), BudgetLine("vLLM", rollout=5 * GIB)]
    vllm = VLLMShare(granted=0.2, fixed=5 * GIB, cache=0, sample=GIB, phases=("rollout",))
    engine = VLLMEngine(gpu_memory_utilization=0.2)
    granted = _grant(engine, Budget(20 * GIB, lines, vllm=vllm), samples)
    assert engine.gpu_memory_utilization == granted.granted == share
    assert granted.cache == (0 if share == 0.2 else pytest.approx((20 * share - 5) * GIB, abs=1))


def test_vllm_gets_what_the_trainer_leaves_or_all_samples_need(folder: Path) -> None:
    run = run_of(folder, ClassifierReward(str(folder / "reward")))
    all_samples = 512 * LENGTH * TOKEN  # 2 GiB at their maximum length
    for memory in (4, 24):
        share, sequences = chosen(run, memory)
        budget = make_budget(*run, torch.bfloat16, memory * GIB, activations=False)
        assert budget.vllm is not None and budget.fits
        left = budget.memory - budget.total("rollout")
        if memory == 4:
            assert 0.05 * budget.memory <= left <= 0.07 * budget.memory
            assert sequences == max(256, budget.vllm.cache // (LENGTH * TOKEN)) < 512
        else:
            assert all_samples * 0.95 <= budget.vllm.cache <= all_samples + budget.memory // 50 and sequences == 512
    assert chosen(run, 24, ranks=8) < (share, sequences)  # of 64 samples
    assert chosen(run, 24) == (share, sequences)
    assert chosen(run, None) == (0.45, 256)


def test_options_that_are_set_and_runs_with_own_rewards_keep_theirs(folder: Path) -> None:
    reward = ClassifierReward(str(folder / "reward"))
    assert chosen(run_of(folder, reward, gpu_memory_utilization=0.3, max_num_seqs=32), 24) == (0.3, 32)
    assert chosen(run_of(folder, CallableReward("math.sqrt")), 24)[0] == 0.45
    assert chosen(run_of(folder, FormatReward()), 24)[0] < 0.45


def test_zero_is_not_a_share() -> None:
    with pytest.raises(UserError, match="gpu_memory_utilization is 0"):
        VLLMEngine(gpu_memory_utilization=0)
