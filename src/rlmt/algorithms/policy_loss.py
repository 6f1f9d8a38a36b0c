"""Loss terms of policy-gradient algorithms: pure functions of flat token tensors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token_mean", "sequence_mean", "constant"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this absolute value, so that one extreme token gives a large number and not infinity."""


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> Tensor:
    """Computes the PPO loss per token with a dual clip (arXiv 1707.06347, eq. 7; dual clip: arXiv 1912.09729, eq. 5).

    -min(r·A, clip(r, 1 - clip_low, 1 + clip_high)·A), and if A < 0 at most -dual_clip·A.

    Args:
        log_ratio: [t] current log-probs minus those before the update.
        advantages: [t] advantages.
        clip_low: Clip range below a ratio of 1.
        clip_high: Clip range above a ratio of 1.
        dual_clip: Bound on the loss of a token with negative advantage, > 1; None is off.

    Returns:
        [t] losses.
    """
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.min(loss, -dual_clip * advantages), loss)
    return loss


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator, clamp: float | None = None) -> Tensor:
    """Estimates KL(policy ‖ reference) per token from the policy's own samples.

    With d = log pi - log ref: k1 = d, k2 = d²/2, k3 = exp(-d) - 1 + d (Schulman, "Approximating KL divergence", 2020).
    As a loss, k1 has no useful gradient (its expectation is 0); k2 has the gradient of the true KL, and k3 that of the
    reverse KL. Where the policy is less likely than the reference by more than 20 nats, k3 is constant.

    Args:
        logprobs: [t] log-probs of the policy, with gradients.
        ref_logprobs: [t] log-probs of the reference.
        estimator: KL estimator.
        clamp: Maximum absolute value of a token's estimate; beyond it the token has no gradient (the authors' code
            clamps k3 to 10). None is off.

    Returns:
        [t] estimates.
    """
    d = logprobs - ref_logprobs
    match estimator:
        case "k1":
            kl = d
        case "k2":
            kl = d.square() / 2
        case "k3":
            # Both terms are clamped: exp(-d) alone would leave the gradient of d, which pushes the token further down.
            d = d.clamp(min=-MAX_LOG_RATIO)
            kl = (-d).exp() - 1 + d
    return kl if clamp is None else kl.clamp(-clamp, clamp)


def truncated_importance(logprobs: Tensor, engine_logprobs: Tensor, cap: float) -> Tensor:
    """Computes truncated importance weights for a mismatch of engine and trainer: min(exp(trainer - engine), cap).

    Args:
        logprobs: [t] log-probs of the trainer before the update; they are detached.
        engine_logprobs: [t] log-probs of the engine.
        cap: Maximum weight.

    Returns:
        [t] weights without gradients.
    """
    return (logprobs.detach() - engine_logprobs).clamp(max=MAX_LOG_RATIO).exp().clamp(max=cap)


def token_weights(lengths: Tensor, mask: Tensor, aggregation: Aggregation, max_new_tokens: int) -> Tensor:
    """Computes the weight of each token in the loss of one optimizer step.

    - `token_mean`: 1 / tokens of the step: every token counts the same (DAPO, arXiv 2503.14476).
    - `sequence_mean`: 1 / (samples · tokens of the sample): every sample counts the same, tokens of long ones less.
      The authors' run computed this, because it averaged over micro-batches of one sample.
    - `constant`: 1 / (samples · max_new_tokens): independent of lengths (Dr. GRPO, arXiv 2503.20783).

    Masked samples have weight 0 and do not count in denominators; if all samples are masked, every weight is 0.

    Args:
        lengths: [n] completion lengths of the step's samples, in tokens.
        mask: [n] bool, True for samples in the loss.
        aggregation: Loss aggregation.
        max_new_tokens: Maximum completion length in tokens.

    Returns:
        [sum of lengths] float32 weights, sample after sample.
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
