"""GRPO: group-relative policy optimisation, as the paper runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from rlmt.algorithms import policy_loss
from rlmt.algorithms.advantages import group_advantages
from rlmt.algorithms.base import Algorithm
from rlmt.algorithms.policy_loss import Aggregation, KLEstimator
from rlmt.errors import UserError
from rlmt.types import Experience, PolicyOutputs, TokenBatch


class GRPO(Algorithm):
    """Group-relative policy optimisation (arXiv 2402.03300) with the RLMT authors' settings as defaults.

    Loss of a token = w · clipped surrogate + kl_coef · KL - entropy_coef · entropy, over thought and response alike,
    where w is 1 or the truncated importance weight; tokens are added up by `loss_aggregation`.

    Args:
        normalize_std: divide group advantages by the group's standard deviation, as the authors' code does; Dr. GRPO
            does not.
        loss_aggregation: `token_mean` over the whole optimizer step, `sequence_mean` (what the authors' run computed)
            or `constant` (Dr. GRPO).
        clip_low: clip range below a ratio of 1.
        clip_high: clip range above it.
        dual_clip: bound for negative advantages, or null.
        kl_coef: weight of the KL penalty; 0 needs no reference model.
        kl_estimator: k1, k2 or k3.
        entropy_coef: weight of the entropy bonus.
        update_epochs: passes over a rollout batch.
        minibatches: optimizer steps a pass.
        mask_truncated: leave samples cut at the length limit out of the loss; they stay in their group's baseline.
        importance_cap: largest weight of the correction for engine and trainer log-probs that differ; null for none.

    Raises:
        UserError: an argument is out of its range.
    """

    def __init__(
        self,
        normalize_std: bool = True,
        loss_aggregation: Aggregation = "token_mean",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = 3.0,
        kl_coef: float = 0.001,
        kl_estimator: KLEstimator = "k3",
        entropy_coef: float = 0.001,
        update_epochs: int = 1,
        minibatches: int = 1,
        mask_truncated: bool = False,
        importance_cap: float | None = None,
    ) -> None:
        self.normalize_std = normalize_std
        self.loss_aggregation = loss_aggregation
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip
        self.kl_coef, self.kl_estimator, self.entropy_coef = kl_coef, kl_estimator, entropy_coef
        self.update_epochs, self.minibatches = update_epochs, minibatches
        self.mask_truncated = mask_truncated
        self.importance_cap = importance_cap
        self._check_ranges()

    def _check_ranges(self) -> None:
        rules = {
            "clip_low": (0 < self.clip_low < 1, "must be between 0 and 1"),
            "clip_high": (self.clip_high > 0, "must be positive"),
            "dual_clip": (self.dual_clip is None or self.dual_clip > 1, "must be above 1, or null"),
            "kl_coef": (self.kl_coef >= 0, "must not be negative"),
            "entropy_coef": (self.entropy_coef >= 0, "must not be negative"),
            "update_epochs": (self.update_epochs >= 1, "must be at least 1"),
            "minibatches": (self.minibatches >= 1, "must be at least 1"),
            "importance_cap": (self.importance_cap is None or self.importance_cap > 0, "must be positive, or null"),
        }
        for option, (ok, rule) in rules.items():
            if not ok:
                raise UserError(f"--model.algorithm.{option} is {getattr(self, option)}: it {rule}.")

    @property
    def needs_reference(self) -> bool:
        """Only for the KL penalty."""
        return self.kl_coef > 0

    def check(self, group_size: int) -> None:
        """A group of one has no spread, and its advantage is always 0."""
        if group_size < 2:
            what = "has no standard deviation" if self.normalize_std else "always has advantage 0"
            raise UserError(
                f"--data.group_size is {group_size}: GRPO compares samples of one prompt, and a group of one {what}; "
                "set it to 2 or more (the paper uses 8)."
            )

    def prepare(self, experience: Experience) -> None:
        """Advantage of each sample against its group."""
        experience.advantages = group_advantages(experience.scores.total, experience.group, self.normalize_std)
        if self.mask_truncated:
            experience.mask = ~experience.truncated

    def token_weights(self, lengths: Tensor, mask: Tensor, max_new_tokens: int) -> Tensor:
        """By `loss_aggregation`."""
        return policy_loss.token_weights(lengths, mask, self.loss_aggregation, max_new_tokens)

    def loss(self, batch: TokenBatch, outputs: PolicyOutputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Surrogate, KL penalty and entropy bonus of one micro-batch."""
        now = outputs.logprobs.detach()
        old = now if batch.old_logprobs is None else batch.old_logprobs
        log_ratio = outputs.logprobs - old
        loss = policy_loss.clipped_surrogate(log_ratio, batch.advantages, self.clip_low, self.clip_high, self.dual_clip)
        if self.importance_cap is not None:
            loss = loss * policy_loss.truncated_importance(old, batch.engine_logprobs, self.importance_cap)
        loss = loss - self.entropy_coef * outputs.entropy
        log_ratio = log_ratio.detach()
        ratio = log_ratio.exp()
        metrics = {
            "policy/entropy": outputs.entropy.detach(),
            "policy/approx_kl": ratio - 1 - log_ratio,
            "policy/clip_low": ((ratio < 1 - self.clip_low) & (batch.advantages < 0)).float(),
            "policy/clip_high": ((ratio > 1 + self.clip_high) & (batch.advantages > 0)).float(),
            "policy/ratio_max": ratio,
        }
        if batch.ref_logprobs is not None:
            kl = policy_loss.kl_penalty(outputs.logprobs, batch.ref_logprobs, self.kl_estimator)
            loss = loss + self.kl_coef * kl
            metrics["policy/kl"] = kl.detach()
        return torch.sum(loss * batch.weights), metrics
