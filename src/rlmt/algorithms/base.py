"""The Algorithm seam: from rewards to a loss. Tensors in, tensors out; never logs, never touches the Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlmt.types import Experience, PolicyOutputs, TokenBatch


@dataclass(frozen=True)
class CriticOptions:
    """Which critic an objective wants; the module makes it."""

    init: str
    """`policy`: a copy of the policy's backbone; else folder or hub name of a reward model to start from."""
    lr: float
    """Learning rate of the critic's own parameters."""
    shared: bool
    """Whether the value head reads the policy's own backbone instead of a copy."""
    warmup_steps: int
    """Optimizer steps at the start in which the critic alone is trained."""


class Algorithm(ABC):
    """One objective. Hyper-parameters are constructor arguments; the update schedule is shared by all."""

    update_epochs: int = 1
    """Passes over a rollout batch."""
    minibatches: int = 1
    """Optimizer steps a pass."""
    dynamic_sampling: int = 0
    """Most extra draws a step, each of a whole batch, that replace groups whose rewards are all equal."""
    critic: CriticOptions | None = None
    """The critic that is trained beside the policy, or None."""
    logprob_temperature: float | None = None
    """Temperature that log-probs are taken at; None: the sampling temperature."""

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probs are wanted; without them no reference model is loaded."""
        return False

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether `prepare` reads the policy's log-probs from before the update; several steps need them anyway."""
        return False

    @property
    def off_policy_correction(self) -> str:
        """What the objective does about samples that other weights drew, in words for the user."""
        return "the objective takes them as they are"

    def check(self, group_size: int) -> None:
        """Raises UserError where the objective cannot work with this many samples a prompt."""

    def select(self, experience: Experience) -> None:
        """Sets `experience.pairs` from rewards alone, before log-probs are computed; objectives over pairs only.

        Reference log-probs are then computed for the paired samples only.
        """

    @abstractmethod
    def prepare(self, experience: Experience) -> None:
        """Sets `experience.advantages` (and `returns`) from rewards and log-probs; `mask` if samples are left out.

        May add `metrics`. Objectives over pairs have nothing to prepare.
        """

    @abstractmethod
    def token_weights(self, lengths: Tensor, mask: Tensor, max_new_tokens: int) -> Tensor:
        """Each token's share in the loss of one optimizer step, so that loss = Σ weight · token loss.

        Args:
            lengths: [n] completion lengths of all samples of the step, in tokens.
            mask: [n] bool, the samples that take part in the loss.
            max_new_tokens: the completion length limit.

        Returns:
            float32, one a token, samples end to end.
        """

    @abstractmethod
    def loss(self, batch: TokenBatch, outputs: PolicyOutputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the loss, and values to log.

        Returns:
            A scalar loss, and detached one-dimensional tensors by name, an element for each token, sample or pair: each
            is averaged over all its elements in the step, those whose name ends in `_max` are maximised.
        """

    def value_loss(self, batch: TokenBatch, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the critic's loss, and values to log; objectives with a critic have it.

        Args:
            batch: with `values` before the update and `returns`.
            values: [t] float32 the critic's values now, with gradients.

        Returns:
            As `loss`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no critic")

    def state_dict(self) -> dict[str, Any]:
        """What changes while training and has to be resumed, as plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` returned."""
