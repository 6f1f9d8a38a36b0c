"""PPO: a critic tells each token what was to be expected, and the policy learns from the difference."""

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
    """Proximal policy optimisation (arXiv 1707.06347) with the RLMT authors' settings as defaults.

    The reward of a sample stands on its last token; advantages come from a critic by GAE over thought and response
    alike. A sample cut at the length limit counts as ended there (no value is expected beyond it), as in the authors'
    code; `mask_truncated` leaves such samples out of both losses. Samples of one prompt are not compared, so one a
    prompt is enough.

    Args:
        gamma: discount of a token, up to 1.
        lam: lambda of GAE: 0 trusts the critic, 1 the rewards.
        kl_placement: whether the KL penalty is part of the loss, by `kl_estimator`, or of the reward: there it is k1,
            log policy - log reference, taken off each token's reward. `kl_coef` 0 is no penalty at all.
        target_kl: KL(policy ‖ reference) of a whole completion, in nats, that `kl_coef` is steered to; null keeps
            `kl_coef` as it is.
        kl_horizon: samples in which the steering of `target_kl` can change the coefficient by a fifth.
        whiten_advantages: give advantages mean 0 and standard deviation 1 over all tokens of a rollout batch.
        value_clip: how far from its value before the update the critic gains from moving, in units of the reward; null
            for no limit.
        critic_init: `policy` to start the critic as a copy of the policy with a value head of zeros; else folder or hub
            name of a reward model with the policy's tokenizer, whose backbone and score head it starts from.
        critic_lr: learning rate of the critic, or of its value head alone where `critic_shared` is on without adapters.
        critic_shared: whether the value head reads the policy's own backbone, which saves a copy of it. On a policy
            with adapters the critic then has adapters of its own; without them its gradient moves the policy's weights.
        critic_warmup_steps: optimizer steps at the start in which the critic learns and the policy waits.
        **options: those of `PolicyGradient`.

    Raises:
        UserError: an argument is out of its range, or two do not go together.
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
            raise UserError("--model.algorithm.target_kl steers kl_coef, which is 0: give one above 0 to begin with.")
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
        """For a KL that has to be known before the update."""
        return self._controller is not None or (self.kl_coef > 0 and self.kl_placement == "reward")

    @property
    def kl_loss_coef(self) -> float:
        """0 where the penalty is in the reward."""
        return self._kl_coef_now if self.kl_placement == "loss" else 0.0

    def prepare(self, experience: Experience) -> None:
        """Advantages and returns by GAE, and the KL coefficient of this step."""
        assert experience.values is not None, "PPO needs a critic"
        if self.mask_truncated:
            experience.mask = ~experience.truncated
        rewards = rewards_on_last_tokens(experience.scores.total, experience.lengths)
        if self.needs_old_logprobs:
            rewards = rewards - self._reward_penalty(experience)
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

    def _reward_penalty(self, experience: Experience) -> Tensor | float:
        """What the KL takes off each token's reward; steers the coefficient of the steps to come."""
        assert experience.old_logprobs is not None and experience.ref_logprobs is not None
        kl = policy_loss.kl_penalty(experience.old_logprobs, experience.ref_logprobs, "k1")
        if self._controller is not None:
            self._kl_coef_now = self._controller.coef
            parts = all_gather_object((float(kl.sum()), len(experience.lengths)))
            samples = sum(samples for _, samples in parts)
            of_completion = sum(kl_sum for kl_sum, _ in parts) / samples
            self._controller.update(of_completion, samples)
            experience.metrics |= {"policy/kl_coef": self._kl_coef_now, "policy/completion_kl": of_completion}
        return self._kl_coef_now * kl if self.kl_placement == "reward" else 0.0

    def value_loss(self, batch: TokenBatch, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the squared error, which a value cannot lower by moving further than `value_clip` (PPO2, as in verl).

        ½ · max((V - R)², (clip(V, V_old ± value_clip) - R)²), added up by `loss_aggregation`.
        """
        assert batch.values is not None and batch.returns is not None
        error = (values - batch.returns).square()
        clipped = torch.zeros_like(error)
        if self.value_clip is not None:
            near = batch.values + (values - batch.values).clamp(-self.value_clip, self.value_clip)
            inside = (values - batch.values).abs() <= self.value_clip  # there rounding must not count as clipping
            clipped = torch.where(inside, error, (near - batch.returns).square())
        loss = torch.sum(torch.max(error, clipped) / 2 * batch.weights)
        return loss, {"critic/clip_frac": (clipped > error).detach().float()}

    def state_dict(self) -> dict[str, Any]:
        """The coefficient that `target_kl` has steered to."""
        return {} if self._controller is None else {"kl_coef": self._controller.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from that coefficient; without one in the checkpoint, from `kl_coef`."""
        if self._controller is not None and "kl_coef" in state:
            self._controller.coef = state["kl_coef"]
