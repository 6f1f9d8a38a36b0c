"""PPO: a clipped policy gradient with a critic and generalized advantage estimation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rlmt.algorithms import policy_loss
from rlmt.algorithms.advantages import (
    explained_variance,
    generalized_advantages,
    rewards_on_last_tokens,
    whitened,
)
from rlmt.algorithms.base import CriticOptions
from rlmt.algorithms.kl_controller import AdaptiveKL
from rlmt.algorithms.policy_gradient import PolicyGradient
from rlmt.distributed.collectives import all_gather_object
from rlmt.errors import UserError
from rlmt.options import (
    ClosedUnitInterval,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UnitIntervalAboveZero,
    check_ranges,
)
from rlmt.types import Experience, TokenBatch


class PPO(PolicyGradient):
    """Proximal policy optimization (arXiv 1707.06347) with the RLMT authors' settings as defaults.

    The reward of a sample is on its last token; GAE with the critic's values gives the advantages of all tokens, of
    thought and response. A truncated sample counts as ended (the value after it is 0), as in the authors' code;
    `mask_truncated` leaves such samples out of both losses. Samples of one prompt are not compared, so one sample per
    prompt is enough.

    Args:
        gamma: Discount factor per token, up to 1.
        lam: Lambda of GAE: 0 bootstraps from the critic, 1 sums the rewards.
        kl_placement: Where the KL penalty is: in the loss, by `kl_estimator`, or in each token's reward, as k1 (log
            policy - log reference). There is no penalty if `kl_coef` is 0.
        target_kl: Target KL(policy ‖ reference) of a completion, in nats, to which `kl_coef` adapts; null keeps
            `kl_coef` constant.
        kl_horizon: Number of samples in which `target_kl` can change the coefficient by a fifth.
        whiten_advantages: Whether advantages are scaled to mean 0 and standard deviation 1 over a rollout batch.
        value_clip: Clip range of the value loss around the value before the update, in units of the reward; null is
            off.
        critic_init: Initial weights of the critic: `policy` for a copy of the policy with a value head of zeros, else
            folder or hub name of a reward model with the policy's tokenizer, for its backbone and score head.
        critic_lr: Learning rate of the critic, or only of its value head with `critic_shared` and no adapters.
        critic_shared: Whether the value head uses the policy's own backbone, which saves memory. On a policy with
            adapters the critic then has adapters of its own; otherwise its gradient updates the policy's weights.
        critic_warmup_steps: Number of optimizer steps at the start that train only the critic.
        **options: Options of `PolicyGradient`.

    Raises:
        UserError: An option is out of range, or two options contradict each other.
    """

    def __init__(
        self,
        gamma: UnitIntervalAboveZero = 1.0,
        lam: ClosedUnitInterval = 1.0,
        kl_placement: Literal["loss", "reward"] = "loss",
        target_kl: PositiveFloat | None = None,
        kl_horizon: PositiveInt = 10_000,
        whiten_advantages: bool = True,
        value_clip: PositiveFloat | None = 0.5,
        critic_init: str = "policy",
        critic_lr: PositiveFloat = 1e-5,
        critic_shared: bool = False,
        critic_warmup_steps: NonNegativeInt = 0,
        **options: Any,
    ) -> None:
        check_ranges(PPO, locals())
        super().__init__(**options)
        self.gamma, self.lam = gamma, lam
        self.kl_placement, self.target_kl, self.kl_horizon = kl_placement, target_kl, kl_horizon
        self.whiten_advantages, self.value_clip = whiten_advantages, value_clip
        self.critic_lr, self.critic_warmup_steps = critic_lr, critic_warmup_steps
        if target_kl is not None and self.kl_coef == 0:
            raise UserError("--model.algorithm.target_kl adapts kl_coef, which is 0: set kl_coef above 0.")
        if critic_shared and critic_init != "policy":
            raise UserError(
                f"--model.algorithm.critic_init is {critic_init}, but a shared critic has the policy's backbone: "
                "leave one of critic_init and critic_shared out."
            )
        self.critic = CriticOptions(critic_init, critic_lr, critic_shared, critic_warmup_steps)
        self._controller = None if target_kl is None else AdaptiveKL(self.kl_coef, target_kl, kl_horizon)
        self._kl_coef_now = self.kl_coef

    @property
    def needs_old_logprobs(self) -> bool:
        """True for a KL that is computed before the update."""
        return self._controller is not None or (self.kl_coef > 0 and self.kl_placement == "reward")

    @property
    def kl_loss_coef(self) -> float:
        """Weight of the KL penalty in the loss of this step; 0 if the penalty is in the reward."""
        return self._kl_coef_now if self.kl_placement == "loss" else 0.0

    def prepare(self, experience: Experience) -> None:
        """Computes advantages and returns by GAE, and updates the KL coefficient."""
        assert experience.values is not None, "PPO needs a critic"
        if self.mask_truncated:
            experience.mask = ~experience.truncated
        rewards = rewards_on_last_tokens(experience.scores.total, experience.lengths)
        if self.needs_old_logprobs:
            rewards = rewards - self._kl_penalty_in_reward(experience)
        experience.advantages, experience.returns = generalized_advantages(
            rewards, experience.values, experience.lengths, self.gamma, self.lam
        )
        mask = torch.ones_like(experience.lengths, dtype=torch.bool) if experience.mask is None else experience.mask
        tokens = mask.repeat_interleave(experience.lengths)
        experience.metrics["critic/explained_variance"] = explained_variance(
            experience.values[tokens], experience.returns[tokens]
        )
        if self.whiten_advantages:
            experience.advantages = whitened(experience.advantages, tokens)

    def _kl_penalty_in_reward(self, experience: Experience) -> Tensor | float:
        """KL penalty in each token's reward, [T] or 0; updates the coefficient of later steps."""
        assert experience.old_logprobs is not None and experience.ref_logprobs is not None
        kl = policy_loss.kl_penalty(experience.old_logprobs, experience.ref_logprobs, "k1")
        if self._controller is not None:
            self._kl_coef_now = self._controller.coef
            parts = all_gather_object((float(kl.sum()), len(experience.lengths)))
            samples = sum(samples for _, samples in parts)
            completion_kl = sum(kl_sum for kl_sum, _ in parts) / samples
            self._controller.update(completion_kl, samples)
            experience.metrics |= {"policy/kl_coef": self._kl_coef_now, "policy/completion_kl": completion_kl}
        return self._kl_coef_now * kl if self.kl_placement == "reward" else 0.0

    def value_loss(self, batch: TokenBatch, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the clipped value loss (PPO2, as in verl).

        ½ · max((V - R)², (clip(V, V_old ± value_clip) - R)²), weighted by `loss_aggregation`.
        """
        assert batch.values is not None and batch.returns is not None
        error = (values - batch.returns).square()
        clipped = torch.zeros_like(error)
        if self.value_clip is not None:
            near = batch.values + (values - batch.values).clamp(-self.value_clip, self.value_clip)
            inside = (values - batch.values).abs() <= self.value_clip  # rounding must not count as clipping
            clipped = torch.where(inside, error, (near - batch.returns).square())
        loss = torch.sum(torch.max(error, clipped) / 2 * batch.weights)
        return loss, {"critic/clip_frac": (clipped > error).detach().float()}

    def state_dict(self) -> dict[str, Any]:
        """The adapted KL coefficient; empty without `target_kl`."""
        return {} if self._controller is None else {"kl_coef": self._controller.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the adapted KL coefficient; if the checkpoint has none, `kl_coef` stays."""
        if self._controller is not None and "kl_coef" in state:
            self._controller.coef = state["kl_coef"]
