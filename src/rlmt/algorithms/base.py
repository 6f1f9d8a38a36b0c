"""The Algorithm interface: from rewards to a loss; tensors in, tensors out, without logging or a Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlmt.types import Experience, PolicyOutputs, TokenBatch


@dataclass(frozen=True)
class CriticOptions:
    """Options of the critic; the module builds it."""

    init: str
    """Initial weights: `policy` for a copy of the policy's backbone, else folder or hub name of a reward model."""
    lr: float
    """Learning rate of the critic's own parameters."""
    shared: bool
    """Whether the value head uses the policy's own backbone instead of a copy."""
    warmup_steps: int
    """Number of optimizer steps at the start that train only the critic."""


class Algorithm(ABC):
    """A training objective. Hyper-parameters are constructor arguments; the update schedule is common to all."""

    update_epochs: int = 1
    """Number of passes over a rollout batch."""
    minibatches: int = 1
    """Number of optimizer steps per pass."""
    dynamic_sampling: int = 0
    """Maximum number of extra rollout batches per step, which replace groups of equal rewards; 0 is off."""
    critic: CriticOptions | None = None
    """Options of the critic; None for an algorithm without one."""
    logprob_temperature: float | None = None
    """Temperature of the log-probs; None is the sampling temperature."""

    @property
    def needs_reference(self) -> bool:
        """True if the algorithm uses reference log-probs; otherwise no reference model is loaded."""
        return False

    @property
    def needs_old_logprobs(self) -> bool:
        """True if `prepare` uses the policy's log-probs before the update; several updates need them anyway."""
        return False

    @property
    def selects(self) -> bool:
        """True if the algorithm selects pairs by their rewards, so that log-probs cannot be computed before scoring."""
        return type(self).select is not Algorithm.select

    @property
    def off_policy_correction(self) -> str:
        """How the algorithm corrects for off-policy samples, as text for the user."""
        return "the objective takes them as they are"

    def check(self, group_size: int) -> None:
        """Raises UserError if the algorithm does not work with this number of samples per prompt."""

    def select(self, experience: Experience) -> None:
        """Sets `experience.pairs` from rewards alone, before log-probs are computed; objectives over pairs only.

        Reference log-probs are then computed for the paired samples only.
        """

    @abstractmethod
    def prepare(self, experience: Experience) -> None:
        """Sets `experience.advantages` (and `returns`) from rewards and log-probs, and `mask` to exclude samples.

        It may add `metrics`. Algorithms over pairs have nothing to prepare.
        """

    @abstractmethod
    def token_weights(self, lengths: Tensor, mask: Tensor, max_new_tokens: int) -> Tensor:
        """Computes the weight of each token in the loss of one optimizer step: loss = Σ weight · token loss.

        Args:
            lengths: [n] completion lengths of all samples of the step, in tokens.
            mask: [n] bool, True for samples in the loss.
            max_new_tokens: Maximum completion length in tokens.

        Returns:
            [sum of lengths] float32 weights, sample after sample.
        """

    @abstractmethod
    def loss(self, batch: TokenBatch, outputs: PolicyOutputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the micro-batch's share of the loss and the values to log.

        Args:
            batch: The micro-batch's tokens.
            outputs: Log-probs and entropies, with gradients.

        Returns:
            A scalar loss, and detached one-dimensional tensors by name with one element per token, sample or pair. The
            metric is their mean over the step, or their maximum if the name ends in `_max`.
        """

    def value_loss(self, batch: TokenBatch, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the micro-batch's share of the critic's loss and the values to log, for algorithms with a critic.

        Args:
            batch: The micro-batch's tokens, with `returns` and the `values` before the update.
            values: [t] float32 current values of the critic, with gradients.

        Returns:
            As `loss`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no critic")

    def state_dict(self) -> dict[str, Any]:
        """The state that changes during training, as plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state that `state_dict` returned."""
