"""The pieces that policy-gradient objectives are made of: pure functions over flat token tensors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token_mean", "sequence_mean", "constant"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this, so that one absurd token gives a large number and not an infinite one."""


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> Tensor:
    """Per-token PPO loss with a dual clip (arXiv 1707.06347, eq. 7; dual clip: arXiv 1912.09729, eq. 5).

    -min(r·A, clip(r, 1 - clip_low, 1 + clip_high)·A), and where A < 0 no more than -dual_clip·A.

    Args:
        log_ratio: [t] log-prob now minus log-prob before the update.
        advantages: [t].
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above 1.
        dual_clip: bound on the loss of a token with negative advantage, > 1, or None.

    Returns:
        [t] losses.
    """
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.min(loss, -dual_clip * advantages), loss)
    return loss


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference) from the policy's own samples.

    With d = log pi - log ref: k1 = d, k2 = d²/2, k3 = exp(-d) - 1 + d (Schulman, "Approximating KL divergence", 2020).
    As a loss, k1 has no useful gradient (its expectation is 0); k2's is that of the true KL, k3's
    that of the reverse KL.

    Args:
        logprobs: [t] of the policy, with gradient.
        ref_logprobs: [t] of the reference.
        estimator: which.

    Returns:
        [t] estimates.
    """
    d = logprobs - ref_logprobs
    match estimator:
        case "k1":
            return d
        case "k2":
            return d.square() / 2
        case "k3":
            return (-d).clamp(max=MAX_LOG_RATIO).exp() - 1 + d


def truncated_importance(logprobs: Tensor, engine_logprobs: Tensor, cap: float) -> Tensor:
    """Weights that correct for an engine whose log-probs differ from the trainer's: min(exp(trainer - engine), cap).

    Args:
        logprobs: [t] of the trainer at the weights that drew the samples; detached here.
        engine_logprobs: [t] of the engine.
        cap: largest weight.

    Returns:
        [t] weights without gradient.
    """
    return (logprobs.detach() - engine_logprobs).clamp(max=MAX_LOG_RATIO).exp().clamp(max=cap)


def token_weights(lengths: Tensor, mask: Tensor, aggregation: Aggregation, max_new_tokens: int) -> Tensor:
    """Each token's share in the loss of one optimizer step.

    - `token_mean`: 1 / tokens of the step: every token counts the same (DAPO, arXiv 2503.14476).
    - `sequence_mean`: 1 / (samples · tokens of the sample): every sample counts the same, tokens of long ones less.
      What the authors' run really computed, since it averaged micro-batches of one sample.
    - `constant`: 1 / (samples · max_new_tokens): no length enters (Dr. GRPO, arXiv 2503.20783).

    Masked samples weigh 0 and count in no denominator; when all are masked every weight is 0.

    Args:
        lengths: [n] completion lengths of the step's samples.
        mask: [n] bool, samples that take part.
        aggregation: which.
        max_new_tokens: completion length limit.

    Returns:
        [sum of lengths] float32, samples end to end.
    """
    samples, tokens = mask.sum().clamp(min=1).float(), lengths.float()
    match aggregation:
        case "token_mean":
            share = (1.0 / (tokens * mask).sum().clamp(min=1)).expand(len(lengths))
        case "sequence_mean":
            share = 1.0 / (samples * tokens)
        case "constant":
            share = (1.0 / (samples * max_new_tokens)).expand(len(lengths))
    return (share * mask).repeat_interleave(lengths)
