"""Memory of activations and temporaries, measured by running the trainer's own code on fake tensors.

Fake tensors have shapes and storages but no data. The bytes that autograd saves and the peak of live bytes are
therefore known for a model of any size on any machine, whatever its layers, adapters and gradient checkpointing do.
Layers are alike, so a deep model runs with a few layers and the figures are extrapolated to all of them.

torch's own `MemTracker` (2.13) gives the same peaks to the byte on fully trained models and reward forwards, but raises
errors on the shared-prefix forward, which calls the backbone twice, and on LoRA's frozen weights, and has no figure for
the saved bytes (the bytes alive after the forward are up to 7% more, under gradient checkpointing).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, masking_utils
from transformers.integrations import moe

from rlmt.errors import UserError, first_line
from rlmt.models import logprobs
from rlmt.models.micro_batch import MicroBatch
from rlmt.models.output_head import output_head

_FEWER_LAYERS, _MORE_LAYERS = 2, 4
"""The two depths at which a deep model is measured; even, for architectures that alternate two kinds of layers."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a computation, without weights and their gradients."""

    saved: int
    """Bytes that autograd saves between forward and backward."""
    peak: int
    """Maximum number of bytes alive at any time."""


@dataclass(frozen=True)
class BatchShape:
    """Size of a padded micro-batch."""

    rows: int
    """Number of samples."""
    prompt: int
    """Tokens of each prompt."""
    completion: int
    """Tokens of each completion."""
    shared_prefix: bool
    """Whether all samples have the same prompt and use the shared-prefix forward."""

    @property
    def row_length(self) -> int:
        """Tokens of a row of `input_ids`; the last token of a completion is only a target."""
        return self.completion - 1 + (0 if self.shared_prefix else self.prompt)


def update_footprint(
    model: PreTrainedModel,
    shape: BatchShape,
    autocast: torch.dtype | None,
    per_token: Callable[..., Tensor] | None = None,
    memory: int | None = None,
) -> Footprint:
    """Footprint of the forward and backward of a micro-batch.

    Args:
        model: Model in training mode on the meta device; parameters with `requires_grad` are trained. It cannot be used
            afterwards.
        shape: Size of the micro-batch.
        autocast: dtype of the forward where it is not that of the weights.
        per_token: Computes one number a token from the model and a micro-batch; by default log-probs plus entropies.
        memory: Memory of the GPU in bytes, which decides how many logits are computed at a time; None is a CPU.
    """
    compute = per_token or _logprobs_and_entropies
    if per_token is None:
        output_head(model)  # measured by a forward with data, which fake tensors lack

    def run(live: _LiveStorages) -> int:
        saved: dict[int, Any] = {}

        def save(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in live.excluded:
                saved[storage._cdata] = storage
            return tensor

        with torch.autocast("cpu", autocast, enabled=autocast is not None, cache_enabled=False):
            with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
                numbers = compute(model, micro_batch_of(shape))
            total = int(sum(storage.nbytes() for storage in saved.values()))
            saved.clear()
            cast(Any, numbers.sum()).backward()
        return total

    with mock.patch.object(logprobs, "device_memory", lambda device: memory):  # fake tensors are on the CPU
        return _measure(model, run)


def forward_footprint(model: PreTrainedModel, rows: int, length: int) -> Footprint:
    """Footprint of a forward without gradients in the dtype of the weights, as a reward model runs it.

    Args:
        model: Model on the meta device. It cannot be used afterwards.
        rows: Number of sequences.
        length: Tokens of each sequence, padding included.
    """

    def run(live: _LiveStorages) -> int:
        ids = torch.zeros(rows, length, dtype=torch.long)
        with torch.no_grad():
            backbone = cast(Any, model).base_model
            backbone(input_ids=ids, use_cache=False)
        return 0

    return _measure(model, run)


def _logprobs_and_entropies(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    outputs = logprobs.token_logprobs(model, batch, 1.0)
    return outputs.logprobs + outputs.entropy


def micro_batch_of(shape: BatchShape) -> MicroBatch:
    """A micro-batch of zeros."""
    rows, prompt, completion = shape.rows, shape.prompt, shape.completion
    first = 0 if shape.shared_prefix else prompt - 1
    return MicroBatch(
        samples=list(range(rows)),
        shared_prompt=torch.zeros(1, prompt, dtype=torch.long) if shape.shared_prefix else None,
        input_ids=torch.zeros(rows, shape.row_length, dtype=torch.long),
        rows=torch.arange(rows).repeat_interleave(completion),
        columns=torch.arange(first, first + completion).repeat(rows),
        targets=torch.zeros(rows * completion, dtype=torch.long),
    )


def _measure(model: PreTrainedModel, run: Callable[[_LiveStorages], int]) -> Footprint:
    """Runs a fake model with all its layers, or at two smaller depths from which the figures are extrapolated."""
    backbone = cast(Any, model).base_model
    layers = getattr(backbone, "layers", None)

    def measure_once() -> Footprint:
        with _LiveStorages(model) as live:
            saved = run(live)
        return Footprint(saved, live.peak)

    # Sequences packed into a row would need a mask; transformers looks for them in the data, which fake tensors lack.
    unpacked = mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda *_, **__: None)
    grouped = mock.patch.object(moe, "_grouped_mm", _fake_grouped_mm)
    with unpacked, grouped, _one_line_errors(model), FakeTensorMode():
        _make_fake(model)
        if not isinstance(layers, nn.ModuleList) or len(layers) <= _MORE_LAYERS:
            return measure_once()
        measured = []
        for count in (_FEWER_LAYERS, _MORE_LAYERS):
            backbone.layers = layers[:count]
            measured.append(measure_once())
        fewer, more = measured
        factor = (len(layers) - _FEWER_LAYERS) / (_MORE_LAYERS - _FEWER_LAYERS)
        return Footprint(
            fewer.saved + round(factor * (more.saved - fewer.saved)),
            fewer.peak + round(factor * (more.peak - fewer.peak)),
        )


@contextmanager
def _one_line_errors(model: PreTrainedModel) -> Iterator[None]:
    """Raises UserError where the forward of an architecture depends on data, which fake tensors lack."""
    try:
        yield
    except Exception as error:  # of any type
        raise UserError(
            f"{model.config.name_or_path or type(model).__name__}: `rlmt plan` cannot measure the activations of "
            f"{model.config.model_type} ({first_line(error)}); try a step with `rlmt fit`."
        ) from error


def _fake_grouped_mm(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """The products of a mixture of experts, for fake tensors; torch 2.13 has them in bfloat16 only.

    Args:
        rows: [tokens · active experts, in] one row for each token and expert that it is routed to.
        weight: [experts, in, out] weights of all experts.
        offs: [experts] end of each expert's rows.

    Returns:
        [tokens · active experts, out].
    """
    return cast(Tensor, cast(Any, _GroupedProducts).apply(rows.to(weight.dtype), weight))


class _GroupedProducts(torch.autograd.Function):
    """Allocates and saves what the grouped matrix product does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return rows.new_empty(len(rows), weight.shape[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(
            torch.empty_like(saved) if needed else None
            for saved, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        )


def _make_fake(model: nn.Module) -> None:
    """Replaces meta tensors by fake CPU tensors, and gives trained parameters gradients, as after a step."""
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in parameters:  # tied parameters stay one tensor
                    new = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
                    new.grad = torch.empty_like(new) if old.requires_grad else None
                    parameters[id(old)] = new
                module._parameters[name] = parameters[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operators allocate until they are freed; the model's own are excluded."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        own = [*model.parameters(), *model.buffers()]
        own += [p.grad for p in model.parameters() if p.grad is not None]
        self.excluded = {cast(Any, tensor.untyped_storage())._cdata for tensor in own}
        self.current = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes or key in self.excluded:
            return
        self._sizes[key] = storage.nbytes()
        self.current += self._sizes[key]
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.current -= self._sizes.pop(key)
