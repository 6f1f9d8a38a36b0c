"""The interface to what brings the policy's weights to servers, and what every rank knows of published weights."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from rlmt.types import AdapterWeights


@dataclass(frozen=True)
class PublishedWeights:
    """Version of the weights that servers have to hold, and where they load them from."""

    run: str
    """Unique name of the run."""
    version: int
    """Version of the policy."""
    weights: str | None = None
    """Folder of all weights: the policy's, or those of its frozen base. None if they were sent to the servers, which
    cannot load them a second time."""
    adapter: str | None = None
    """Folder of the adapter on top of them, in PEFT's format."""

    @property
    def prefix(self) -> str:
        """Prefix of the labels of all weights of this run."""
        return f"rlmt-{self.run}-"

    @property
    def label(self) -> str:
        """Label of a server that holds these weights, up to its dot; also the adapter's name on the server."""
        return f"{self.prefix}{self.version}"


class WeightTransfer(ABC):
    """Brings the policy's weights to the servers; only rank 0 has one."""

    def __init__(self) -> None:
        self.run = uuid.uuid4().hex[:12]
        """Unique name of the run."""

    @abstractmethod
    def publish(
        self, weights: Iterable[tuple[str, Tensor]] | None, version: int, adapter: AdapterWeights | None = None
    ) -> PublishedWeights:
        """Sends the policy's weights to the servers, or writes them to where servers load them from.

        Args:
            weights: Names and tensors of a checkpoint; each tensor is made when it is read, and may be freed when the
                next one is. None keeps those of the last call.
            version: Version of the policy.
            adapter: The policy's adapter, if it has one.

        Raises:
            UserError: The weights cannot be sent or written.
        """

    @abstractmethod
    def close(self) -> None:
        """Releases everything that it holds; harmless when called twice."""
