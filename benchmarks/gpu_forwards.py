"""Part 6 of benchmarks/gpu.py: the forwards of a step, on the models and the rollouts of a run of `rlmt fit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_models import Setup, report_gaps
from torch import Tensor

from rlmt.models.logprobs import token_logprobs
from rlmt.models.micro_batch import micro_batches, token_offsets, token_positions
from rlmt.models.reward_model import last_token_states, score_states
from rlmt.models.rows import packs_rows
from rlmt.models.training_mode import eval_mode
from rlmt.models.varlen import VARLEN, register_varlen
from rlmt.modules import RLMTModule
from rlmt.types import Experience, RolloutBatch


@torch.no_grad()
def compare_forwards(setup: Setup, module: RLMTModule, experience: Experience) -> None:
    """Times log-probs and scores in several ways, and compares their values."""
    rollouts, policy = experience.rollouts, module.trained_model
    budget, total = module.tokens_per_micro_batch, sum(rollouts.lengths)
    compare_scores(setup, module.reward, experience)
    ways: dict[str, Callable[[], Tensor]] = {
        "own prompts": lambda: all_logprobs(policy, rollouts, budget, False, setup.device),
        "shared prompts": lambda: all_logprobs(policy, rollouts, budget, True, setup.device),
        "packed rows": lambda: all_logprobs(policy, rollouts, budget, False, setup.device),
    }
    register_varlen()
    with eval_mode(policy), torch.autocast(setup.device_type, torch.bfloat16, enabled=setup.on_gpu):
        expected = ways["own prompts"]()
        for name, way in ways.items():
            policy.set_attn_implementation(VARLEN if name == "packed rows" else "sdpa")
            setup.speed_and_peak(f"log-probs, {name}", total, way, 1)
            report_gaps(setup, f"log-probs, {name}, against own prompts", way() - expected)
    policy.set_attn_implementation("sdpa")


def all_logprobs(policy: Any, rollouts: RolloutBatch, budget: int, share: bool, device: torch.device) -> Tensor:
    """[T] log-probs of all samples."""
    out, offsets = torch.empty(sum(rollouts.lengths), device=device), token_offsets(torch.tensor(rollouts.lengths))
    for batch in micro_batches(rollouts, range(len(rollouts)), budget, share, device, packed=packs_rows(policy)):
        positions = token_positions(batch.samples, offsets, rollouts.lengths).to(device)
        out[positions] = token_logprobs(policy, batch, rollouts.sampling.temperature).logprobs
    return out


def compare_scores(setup: Setup, reward: Any, experience: Experience) -> None:
    """Times the reward model's forward with and without an attention mask, and compares the scores."""
    responses = [split.response for split in experience.splits]
    rows = [torch.tensor(row) for row in reward.encode(experience.rollouts.prompt_per_sample, responses)]
    model, tokens = reward.model, sum(map(len, rows))

    def without_mask() -> Tensor:
        return score_states(model, last_token_states(model.base_model, rows, setup.device))

    def with_mask() -> Tensor:
        width = max(map(len, rows))
        ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows]).to(setup.device)
        last = torch.tensor([len(row) - 1 for row in rows], device=setup.device)
        mask = torch.arange(width, device=setup.device)[None] <= last[:, None]
        hidden = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return score_states(model, hidden[torch.arange(len(rows), device=setup.device), last])

    setup.speed_and_peak("scores, without a mask", tokens, without_mask, 1)
    setup.speed_and_peak("scores, with a mask", tokens, with_mask, 1)
    gap = float((with_mask() - without_mask()).abs().max() / without_mask().abs().max().clamp_min(1e-6))
    setup.report.equal("scores with a mask against those without, relative", gap, 0.2 if setup.on_gpu else 1e-4)
