"""The policy's weights as vLLM loads them: with the names and in the pieces of a checkpoint on the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from rlmt.annotations import PreTrainedModel
from rlmt.models.adapters import base_tensors
from rlmt.models.loading import meta_model
from rlmt.models.quantization import unquantized_shape


class VLLMWeights:
    """What vLLM loads of a policy.

    In transformers a mixture-of-experts layer is one tensor of all its experts, and some modules have another name than
    in checkpoints; vLLM reads checkpoints.

    Args:
        policy: The trainer's policy, or one of the same config on the meta device.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        names = frozenset(base_tensors(policy))
        # vLLM's Gemma 2 and Gemma 3n read the head from the embeddings, and refuse a weight of that name.
        without_head = policy.config.model_type in ("gemma2", "gemma3n_text") and policy.config.tie_word_embeddings
        self.names = names - {"lm_head.weight"} if without_head else names
        """Names in the policy's `state_dict()`; tied weights have several."""
        mapping: list[Any] = get_model_conversion_mapping(policy, add_legacy=False)
        converts = any(not isinstance(transform, PrefixChange) for transform in mapping)
        # A new model, since one that was loaded also has the prefixes of its checkpoint, which vLLM's class has not.
        self._model = meta_model(policy.config) if converts else None

    def load(self, weights: Iterable[tuple[str, Tensor]], missing: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields the weights as in a checkpoint, one at a time, so that no second copy of the policy is needed.

        Args:
            weights: Names and tensors of the policy's `state_dict()`; others are left out.
            missing: Receives no value; each name that was read is removed from it.
        """
        from transformers.core_model_loading import revert_weight_conversion

        for name, tensor in weights:
            missing.discard(name)
            if name not in self.names:
                continue
            if self._model is None:
                yield name, tensor
            else:
                yield from revert_weight_conversion(self._model, {name: tensor.detach()}).items()

    def load_all(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """As `load`, and raises ValueError at the end if a weight was missing; the engine would keep a stale one."""
        missing = set(self.names)
        yield from self.load(weights, missing)
        check_complete(missing)

    def shapes(self, policy: PreTrainedModel) -> list[tuple[str, tuple[int, ...]]]:
        """Names and unsharded shapes of what `load` yields for the policy's weights, in their order; reads none.

        Args:
            policy: The policy, which may be sharded, quantized, with an adapter, or on the meta device.
        """
        empty = {
            name: torch.empty(unquantized_shape(tensor), device="meta") for name, tensor in base_tensors(policy).items()
        }
        return [(name, tuple(tensor.shape)) for name, tensor in self.load(empty.items(), set())]


def check_complete(missing: set[str]) -> None:
    """Raises ValueError if `missing`, from `VLLMWeights.load`, still has a name."""
    if missing:
        raise ValueError(f"{len(missing)} of the policy's weights were not passed to sync, such as {min(missing)}.")
