"""Memory that computing takes beside the weights, found by running the trainer's own code on tensors without data.

Torch's fake tensors have shapes and storages but no memory behind them, so what autograd would keep and the most that
would be alive at one time come out for a model of any size, on any machine, with whatever its layers, adapters and
checkpoints do. Layers are alike: a deep model is run with a few of them and the rest is added.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, masking_utils

from rlmt.models.logprobs import token_logprobs
from rlmt.models.micro_batch import MicroBatch

_FEW, _MORE = 2, 4
"""Layers that a deep model is run with, twice; even, for architectures that alternate between two kinds."""


@dataclass(frozen=True)
class Footprint:
    """Bytes beside weights and their gradients."""

    kept: int
    """What autograd keeps between forward and backward."""
    peak: int
    """The most that is alive at any time."""


@dataclass(frozen=True)
class BatchShape:
    """A padded micro-batch, by its size."""

    rows: int
    """Samples."""
    prompt: int
    """Tokens of each prompt."""
    completion: int
    """Tokens of each completion."""
    shared: bool
    """Whether all samples are of one prompt and share its computation."""


def update_footprint(
    model: PreTrainedModel,
    tokens: BatchShape,
    autocast: torch.dtype | None,
    to_numbers: Callable[..., Tensor] | None = None,
) -> Footprint:
    """Of a micro-batch's forward and backward.

    Args:
        model: in training mode on the meta device; what has `requires_grad` is trained. It is used up.
        tokens: the micro-batch.
        autocast: number format of the forward where it is not the weights' own.
        to_numbers: from model and micro-batch to one number a token; the log-probs and entropies by default.
    """
    compute = to_numbers or _objective

    def run(live: _Live) -> int:
        kept: dict[int, Any] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in live.known:
                kept[storage._cdata] = storage
            return tensor

        with torch.autocast("cpu", autocast, enabled=autocast is not None, cache_enabled=False):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                numbers = compute(model, _micro_batch(tokens))
            total = int(sum(storage.nbytes() for storage in kept.values()))
            kept.clear()
            cast(Any, numbers.sum()).backward()
        return total

    return _of_all_layers(model, run)


def forward_footprint(model: PreTrainedModel, rows: int, length: int) -> Footprint:
    """Of a forward without gradients in the weights' own number format, as a reward model runs it.

    Args:
        model: on the meta device. It is used up.
        rows: sequences.
        length: tokens of each, of which some pad.
    """

    def run(live: _Live) -> int:
        ids = torch.zeros(rows, length, dtype=torch.long)
        with torch.no_grad():
            backbone = cast(Any, model).base_model
            backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return 0

    return _of_all_layers(model, run)


def _objective(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    outputs = token_logprobs(model, batch, 1.0)
    return outputs.logprobs + outputs.entropy


def _micro_batch(tokens: BatchShape) -> MicroBatch:
    rows, prompt, completion = tokens.rows, tokens.prompt, tokens.completion
    first = 0 if tokens.shared else prompt - 1
    width = completion - 1 + (0 if tokens.shared else prompt)
    return MicroBatch(
        samples=list(range(rows)),
        shared_prompt=torch.zeros(1, prompt, dtype=torch.long) if tokens.shared else None,
        input_ids=torch.zeros(rows, width, dtype=torch.long),
        rows=torch.arange(rows).repeat_interleave(completion),
        columns=torch.arange(first, first + completion).repeat(rows),
        targets=torch.zeros(rows * completion, dtype=torch.long),
    )


def _of_all_layers(model: PreTrainedModel, run: Callable[[_Live], int]) -> Footprint:
    """Runs a fake model with all its layers, or with two numbers of them, from which its line is drawn."""
    backbone = cast(Any, model).base_model
    layers = getattr(backbone, "layers", None)

    def measured() -> Footprint:
        with _Live(model) as live:
            kept = run(live)
        return Footprint(kept, live.peak)

    # Sequences packed into a row would want a mask; transformers looks for them in the data, and here is none.
    unpacked = mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda *_, **__: None)
    with unpacked, FakeTensorMode():
        _fake(model)
        if not isinstance(layers, nn.ModuleList) or len(layers) <= _MORE:
            return measured()
        seen = []
        for count in (_FEW, _MORE):
            backbone.layers = layers[:count]
            seen.append(measured())
        few, more = seen
        times = (len(layers) - _FEW) / (_MORE - _FEW)
        return Footprint(
            few.kept + round(times * (more.kept - few.kept)), few.peak + round(times * (more.peak - few.peak))
        )


def _fake(model: nn.Module) -> None:
    """Gives a model on the meta device fake tensors on the CPU, and trained parameters gradients as after a step."""
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in parameters:  # tied ones stay one
                    new = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
                    new.grad = torch.empty_like(new) if old.requires_grad else None
                    parameters[id(old)] = new
                module._parameters[name] = parameters[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operators make, as long as they live; the model's own are known."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        own = [*model.parameters(), *model.buffers()]
        own += [p.grad for p in model.parameters() if p.grad is not None]
        self.known = {cast(Any, tensor.untyped_storage())._cdata for tensor in own}
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._alive or key in self.known:
            return
        self._alive[key] = storage.nbytes()
        self.now += self._alive[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._alive.pop(key)
