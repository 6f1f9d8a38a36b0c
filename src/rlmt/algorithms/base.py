"""The Algorithm seam: from rewards to a loss. Tensors in, tensors out; never logs, never touches the Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from rlmt.types import Experience, PolicyOutputs, TokenBatch


class Algorithm(ABC):
    """One objective. Hyper-parameters are constructor arguments; the update schedule is shared by all."""

    update_epochs: int = 1
    """Passes over a rollout batch."""
    minibatches: int = 1
    """Optimizer steps a pass."""

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probs are wanted; without them no reference model is loaded."""
        return False

    def check(self, group_size: int) -> None:
        """Raises UserError where the objective cannot work with this many samples a prompt."""

    @abstractmethod
    def prepare(self, experience: Experience) -> None:
        """Sets `experience.advantages`, and `mask` where some samples stay out; may add to `metrics`."""

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
        """The micro-batch's share of the loss, and per-token values to log.

        Returns:
            A scalar loss, and detached [t] values by name: they are averaged over the step's tokens, those whose name
            ends in `_max` are maximised.
        """
