"""Bytes of what a run holds, worked out from shapes alone: weights, adapters, optimizer states, logits, caches."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlmt.memory.activations import BatchShape
from rlmt.models.adapters import is_adapter
from rlmt.models.output_head import LOGITS_PER_CHUNK
from rlmt.models.quantization import nf4_bytes

_SAMPLE = 2**16
"""Elements of the tensor on which an optimizer's state is measured, in place of larger ones."""


@dataclass(frozen=True)
class Devices:
    """Over which devices a run is spread, and how."""

    ranks: int = 1
    sharded: bool = False
    """Whether models lie in shards on them (FSDP2), or else whole on each."""
    offload: bool = False
    """Whether the shards lie in the host's memory."""

    def held(self, size: int) -> int:
        """Bytes that a device keeps of something that can lie in shards."""
        return 0 if self.offload else -(-size // self.ranks) if self.sharded else size


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())


def weight_bytes(model: nn.Module, in_four_bits: Iterable[str] = (), double_quant: bool = False) -> int:
    """Bytes of a model's parameters and buffers.

    Args:
        model: on the meta device, in the number format that it is held in.
        in_four_bits: names of the weights that are held in NF4.
        double_quant: whether their scales are quantised, too.
    """
    packed = frozenset(in_four_bits)
    parameters = dict(model.named_parameters())
    whole = tensor_bytes(chain((p for name, p in parameters.items() if name not in packed), model.buffers()))
    return whole + sum(nf4_bytes(parameters[name].numel(), double_quant) for name in packed)


def gathered_bytes(model: nn.Module, compute: torch.dtype) -> int:
    """The most bytes of weights and gradients that FSDP2 puts together at a time, beside a model's shards.

    A group of weights is gathered into a buffer and copied out of it; the next block's buffer is there while a block
    computes, and its gradients are summed in float32. What lies outside of blocks stays together meanwhile, and so does
    the head's gradient, which comes first.

    Args:
        model: on the meta device, in the number format that it is held in; adapters are not counted.
        compute: number format that blocks are put together in.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = [{id(p): p for n, p in block.named_parameters() if not is_adapter(n)} for block in blocks]
    block = max((sum(p.numel() for p in held.values()) for held in inside), default=0)
    own = {id(p): p for n, p in model.named_parameters() if not is_adapter(n)}
    root = tensor_bytes(p for number, p in own.items() if not any(number in held for held in inside))
    together = 2 * (root + block * compute.itemsize)
    if not any(p.requires_grad for p in own.values()):
        return together
    head: nn.Module | None = cast(Any, model).get_output_embeddings()
    first = 0 if head is None else tensor_bytes(head.parameters())
    return max(together, root + first + block * (3 * compute.itemsize + 4))


def optimizer_bytes(make: Callable[[Any], Optimizer], trained: Iterable[Tensor]) -> int:
    """Bytes that an optimizer keeps for the tensors that it trains, between its steps.

    One step is taken, on the CPU, on zeros of each size; of a large tensor the state is that of a smaller one in
    proportion. Paged states are counted in full: under pressure they go to the host's memory.

    Args:
        make: the optimizer, waiting for its parameters.
        trained: their shapes and number formats.
    """
    sizes = Counter((tensor.numel(), tensor.dtype) for tensor in trained)
    each = {kind: _state_bytes(make, *kind) for kind in {(min(size, _SAMPLE), dtype) for size, dtype in sizes}}
    return round(
        sum(count * each[min(size, _SAMPLE), dtype] * max(1, size / _SAMPLE) for (size, dtype), count in sizes.items())
    )


def _state_bytes(make: Callable[[Any], Optimizer], size: int, dtype: torch.dtype) -> int:
    """State of one tensor: of two less that of one, since some tables are there once for all."""

    def of(count: int) -> int:
        parameters = [nn.Parameter(torch.zeros(size, dtype=dtype)) for _ in range(count)]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = make([{"params": parameters}])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Paged optimizers")  # on a CPU they page nothing: the same bytes
            optimizer.step()
        held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        return sum(storages.values())

    return of(2) - of(1)


def step_bytes(make: Callable[[Any], Optimizer], trained: Iterable[Tensor]) -> int:
    """Bytes that an optimizer's step takes on a GPU and gives back: torch's own work on lists of all tensors there."""
    optimizer = make([{"params": [nn.Parameter(torch.zeros(1))]}])
    settings = optimizer.param_groups[0]
    on_lists = settings.get("foreach", False) is not False and not settings.get("fused")
    return tensor_bytes(trained) if on_lists and type(optimizer).__module__.startswith("torch.optim.") else 0


def logits_bytes(tokens: int, head: Tensor, compute: torch.dtype) -> int:
    """The most bytes that the logits of a micro-batch, made a chunk at a time, and their gradients take.

    In backward two float32 copies of a chunk are alive, and a third in a shorter number format of the forward.

    Args:
        tokens: whose logits are wanted.
        head: [V, H] output projection.
        compute: number format that it is multiplied in.
    """
    vocabulary = head.shape[0]
    chunk = min(tokens, max(1, LOGITS_PER_CHUNK // vocabulary))
    short = 0 if compute is torch.float32 else compute.itemsize
    return chunk * vocabulary * (8 + short)


def kv_bytes(config: PretrainedConfig, dtype: torch.dtype, parts: int = 1) -> int:
    """Bytes of one token's keys and values in all layers, on each of as many devices as the heads are shared out to."""
    text: Any = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * int(text.num_hidden_layers) * max(int(heads) // parts, 1) * int(width) * dtype.itemsize


def largest_shard(budget: int, prompt: int, completion: int, samples: int, group_size: int, shared: bool) -> BatchShape:
    """The micro-batch that fills a token budget with the longest samples that do.

    Args:
        budget: tokens, padding included; a single sample may exceed it.
        prompt: tokens of the longest prompt.
        completion: most tokens of a completion.
        samples: samples of one optimizer step.
        group_size: samples of a prompt.
        shared: whether samples of one prompt share its computation, and a micro-batch is of one prompt.
    """
    most, each = (group_size, completion) if shared else (samples, prompt + completion - 1)
    room = max(budget - prompt, 1) if shared else budget
    rows = max(1, min(most, -(-room // each)))
    length = min(each, room // rows) if rows > 1 else each
    if not shared and length < prompt:  # cut samples would be prompts alone
        rows, length = max(1, room // each), each
    return BatchShape(rows, prompt, max(1, length if shared else length - prompt + 1), shared)


def head_of(model: PreTrainedModel) -> Tensor:
    """[V, H] the output projection."""
    return cast(Tensor, cast(Any, model).get_output_embeddings().weight)
