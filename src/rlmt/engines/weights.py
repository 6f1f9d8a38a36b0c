"""The policy's weights on their way to an engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from rlmt.models.adapters import merged
from rlmt.types import AdapterWeights


def crossing_off(weights: Iterable[tuple[str, Tensor]], missing: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Passes weights on and removes their names from `missing`."""
    for name, tensor in weights:
        missing.discard(name)
        yield name, tensor


def merging(weights: Iterable[tuple[str, Tensor]], adapter: AdapterWeights) -> Iterator[tuple[str, Tensor]]:
    """Passes weights on with the adapter in them, one copy at a time."""
    for name, tensor in weights:
        yield name, merged(name, tensor, adapter)
