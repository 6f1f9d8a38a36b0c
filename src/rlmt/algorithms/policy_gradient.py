"""Base class of the policy-gradient algorithms: clipped surrogate, KL penalty and entropy bonus."""

from __future__ import annotations

import torch
from torch import Tensor

from rlmt.algorithms import policy_loss
from rlmt.algorithms.base import Algorithm
from rlmt.algorithms.policy_loss import Aggregation, KLEstimator
from rlmt.options import FloatAboveOne, NonNegativeFloat, OpenUnitInterval, PositiveFloat, PositiveInt, check_ranges
from rlmt.types import PolicyOutputs, TokenBatch

OFF_POLICY_CAP = 2.0
"""Maximum importance weight of off-policy samples if `importance_cap` is null."""


class PolicyGradient(Algorithm):
    """A clipped policy gradient; subclasses compute the advantages in `prepare`.

    Loss of a token = w · clipped surrogate + kl_coef · KL - entropy_coef · entropy, for tokens of thought and response,
    where w is 1 or the truncated importance weight; `loss_aggregation` sets the weights of the tokens.

    Args:
        loss_aggregation: Weights of the tokens: `token_mean` over the optimizer step, `sequence_mean` (as in the
            authors' run) or `constant` (Dr. GRPO).
        clip_low: Clip range below a ratio of 1.
        clip_high: Clip range above a ratio of 1.
        dual_clip: Bound of the loss for negative advantages (dual clip); null is off.
        kl_coef: Weight of the KL penalty; 0 needs no reference model.
        kl_estimator: KL estimator: k1, k2 or k3.
        kl_clamp: Maximum absolute value of a token's KL estimate in the loss, in nats; null is off.
        entropy_coef: Weight of the entropy bonus.
        update_epochs: Number of passes over a rollout batch.
        minibatches: Number of optimizer steps per pass.
        mask_truncated: Whether truncated samples are left out of the loss; they still count in their group's baseline.
        importance_cap: Maximum importance weight, which corrects for a mismatch of engine and trainer log-probs; null
            corrects, with a maximum of 2, off-policy samples and those of an engine with rounded weights only.

    Raises:
        UserError: An option is out of range.
    """

    def __init__(
        self,
        loss_aggregation: Aggregation = "token_mean",
        clip_low: OpenUnitInterval = 0.2,
        clip_high: PositiveFloat = 0.2,
        dual_clip: FloatAboveOne | None = 3.0,
        kl_coef: NonNegativeFloat = 0.001,
        kl_estimator: KLEstimator = "k3",
        entropy_coef: NonNegativeFloat = 0.001,
        update_epochs: PositiveInt = 1,
        minibatches: PositiveInt = 1,
        mask_truncated: bool = False,
        importance_cap: PositiveFloat | None = None,
        kl_clamp: PositiveFloat | None = None,
    ) -> None:
        check_ranges(PolicyGradient, locals())
        self.loss_aggregation = loss_aggregation
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip
        self.kl_coef, self.kl_estimator, self.kl_clamp = kl_coef, kl_estimator, kl_clamp
        self.entropy_coef = entropy_coef
        self.update_epochs, self.minibatches = update_epochs, minibatches
        self.mask_truncated = mask_truncated
        self.importance_cap = importance_cap

    @property
    def needs_reference(self) -> bool:
        """True with a KL penalty."""
        return self.kl_coef > 0

    @property
    def kl_loss_coef(self) -> float:
        """Weight of the KL penalty in the loss of this step."""
        return self.kl_coef

    @property
    def off_policy_correction(self) -> str:
        """Truncated importance weights."""
        return f"importance weights truncated at {self.importance_cap or OFF_POLICY_CAP:g}"

    def token_weights(self, lengths: Tensor, mask: Tensor, max_new_tokens: int) -> Tensor:
        """Computes the weights of `loss_aggregation`; see `policy_loss.token_weights`."""
        return policy_loss.token_weights(lengths, mask, self.loss_aggregation, max_new_tokens)

    def log_ratio(self, logprobs: Tensor, old: Tensor, batch: TokenBatch) -> Tensor:
        """Log of the ratio that is clipped, [t]: the token's own, in GSPO its sequence's."""
        return logprobs - old

    def loss(self, batch: TokenBatch, outputs: PolicyOutputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes surrogate, KL penalty and entropy bonus of one micro-batch."""
        assert batch.advantages is not None
        now = outputs.logprobs.detach()
        old = now if batch.old_logprobs is None else batch.old_logprobs
        log_ratio = self.log_ratio(outputs.logprobs, old, batch)
        loss = policy_loss.clipped_surrogate(log_ratio, batch.advantages, self.clip_low, self.clip_high, self.dual_clip)
        metrics = {}
        cap = self.importance_cap or (OFF_POLICY_CAP if batch.off_policy else None)
        if cap is not None:
            importance = policy_loss.truncated_importance(old, batch.engine_logprobs, cap)
            loss = loss * importance
            metrics = {
                "engine/importance_mean": importance,
                "engine/importance_square": importance.square(),
                "engine/importance_capped": (importance >= cap).float(),
            }
        loss = loss - self.entropy_coef * outputs.entropy
        log_ratio = log_ratio.detach()
        ratio = log_ratio.exp()
        metrics |= {
            "policy/entropy": outputs.entropy.detach(),
            "policy/approx_kl": ratio - 1 - log_ratio,
            "policy/clip_low": ((ratio < 1 - self.clip_low) & (batch.advantages < 0)).float(),
            "policy/clip_high": ((ratio > 1 + self.clip_high) & (batch.advantages > 0)).float(),
            "policy/ratio_max": ratio,
        }
        if batch.ref_logprobs is not None:
            kl = policy_loss.kl_penalty(outputs.logprobs, batch.ref_logprobs, self.kl_estimator, self.kl_clamp)
            loss = loss + self.kl_loss_coef * kl
            metrics["policy/kl"] = kl.detach()
        return torch.sum(loss * batch.weights), metrics
