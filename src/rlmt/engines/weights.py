"""The policy's weights on their way to an engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from rlmt.models.adapters import merge_adapter
from rlmt.types import AdapterWeights


def track_loaded(weights: Iterable[tuple[str, Tensor]], missing: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Passes weights on and removes their names from `missing`."""
    for name, tensor in weights:
        missing.discard(name)
        yield name, tensor


def merge_adapters(weights: Iterable[tuple[str, Tensor]], adapter: AdapterWeights) -> Iterator[tuple[str, Tensor]]:
    """Passes weights on with the adapter in them, one copy at a time."""
    for name, tensor in weights:
        yield name, merge_adapter(name, tensor, adapter)
