"""Bytes of weights, optimizer states, logits and caches, computed from shapes alone."""

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
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from rlmt.distributed.fsdp2 import FSDP2
from rlmt.memory.activations import BatchShape
from rlmt.models.adapters import is_adapter
from rlmt.models.output_head import OutputHead, rows_per_chunk
from rlmt.models.quantization import nf4_bytes

_SAMPLE_SIZE = 2**16
"""Maximum number of elements of the tensors on which optimizer states are measured."""


@dataclass(frozen=True)
class Parallelism:
    """Number of devices of a run, and whether models are sharded over them."""

    ranks: int = 1
    sharded: bool = False
    """Whether models are sharded over the ranks (FSDP2); otherwise each rank holds them in full."""
    offload: bool = False
    """Whether the shards are in host memory."""
    bf16_residual: bool = False
    """Whether hidden states between blocks are in bfloat16 under `bf16-mixed`."""

    @classmethod
    def of(cls, ranks: int, strategy: Any) -> Parallelism:
        """That of a number of ranks and a strategy of Lightning."""
        if not isinstance(strategy, FSDP2):
            return cls(ranks)
        return cls(ranks, True, strategy.offload, strategy.bf16_residual)

    def shard_bytes(self, size: int) -> int:
        """Bytes per device of something of `size` bytes that is sharded if the run is."""
        return 0 if self.offload else -(-size // self.ranks) if self.sharded else size


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; a tensor that occurs more than once is counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())


def weight_bytes(model: nn.Module, quantized: Iterable[str] = (), double_quant: bool = False) -> int:
    """Bytes of a model's parameters and buffers.

    Args:
        model: Model on the meta device, in the dtype that it is stored in.
        quantized: Names of the weights that are stored in NF4.
        double_quant: Whether their scales are quantized, too.
    """
    nf4 = frozenset(quantized)
    parameters = dict(model.named_parameters())
    others = tensor_bytes(chain((p for name, p in parameters.items() if name not in nf4), model.buffers()))
    return others + sum(nf4_bytes(parameters[name].numel(), double_quant) for name in nf4)


def all_gather_bytes(model: nn.Module, compute: torch.dtype) -> int:
    """Peak bytes of the weights and gradients that FSDP2 holds unsharded, without a model's shards.

    FSDP2 all-gathers a group of weights into a buffer and copies them out of it. The next block's buffer exists while a
    block computes, and the block's gradients are reduced in float32. Parameters outside of blocks stay unsharded
    meanwhile, as does the gradient of the output projection, which is computed first.

    Args:
        model: Model on the meta device, in the dtype that it is stored in; adapters are not counted.
        compute: dtype in which blocks are all-gathered.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    in_blocks = [{id(p): p for n, p in block.named_parameters() if not is_adapter(n)} for block in blocks]
    block = max((sum(p.numel() for p in parameters.values()) for parameters in in_blocks), default=0)
    own = {id(p): p for n, p in model.named_parameters() if not is_adapter(n)}
    root = tensor_bytes(p for key, p in own.items() if not any(key in parameters for parameters in in_blocks))
    forward = 2 * (root + block * compute.itemsize)
    if not any(p.requires_grad for p in own.values()):
        return forward
    head: nn.Module | None = cast(Any, model).get_output_embeddings()
    head_gradient = 0 if head is None else tensor_bytes(head.parameters())
    return max(forward, root + head_gradient + block * (3 * compute.itemsize + 4))


def optimizer_bytes(factory: Callable[[Any], Optimizer], trained: Iterable[Tensor]) -> int:
    """Bytes of the optimizer states between steps.

    The optimizer takes one step, on the CPU, on zeros of each size; for a large tensor a smaller one is measured and
    the result is scaled. Paged states are counted in full; under memory pressure they move to the host.

    Args:
        factory: Creates the optimizer from its parameters.
        trained: Trained tensors; only their shapes and dtypes are read.
    """
    sizes = Counter((tensor.numel(), tensor.dtype) for tensor in trained)
    measured = {
        kind: _state_bytes(factory, *kind) for kind in {(min(size, _SAMPLE_SIZE), dtype) for size, dtype in sizes}
    }
    return round(
        sum(
            count * measured[min(size, _SAMPLE_SIZE), dtype] * max(1, size / _SAMPLE_SIZE)
            for (size, dtype), count in sizes.items()
        )
    )


def _state_bytes(factory: Callable[[Any], Optimizer], size: int, dtype: torch.dtype) -> int:
    """State of one tensor: that of two tensors minus that of one, since an optimizer stores some tables only once."""

    def measure(count: int) -> int:
        parameters = [nn.Parameter(torch.zeros(size, dtype=dtype)) for _ in range(count)]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = factory([{"params": parameters}])
        with warnings.catch_warnings():
            # On a CPU paged optimizers do not page, but their states have the same size.
            warnings.filterwarnings("ignore", message="Paged optimizers")
            optimizer.step()
        states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in states}
        return sum(storages.values())

    return measure(2) - measure(1)


def optimizer_step_bytes(factory: Callable[[Any], Optimizer], trained: Iterable[Tensor]) -> int:
    """Temporary bytes of an optimizer step on a GPU, where torch's foreach implementations work on all tensors at once.

    Args:
        factory: Creates the optimizer from its parameters.
        trained: Trained tensors; only their shapes and dtypes are read.
    """
    optimizer = factory([{"params": [nn.Parameter(torch.zeros(1))]}])
    settings = optimizer.param_groups[0]
    foreach = settings.get("foreach", False) is not False and not settings.get("fused")
    return tensor_bytes(trained) if foreach and type(optimizer).__module__.startswith("torch.optim.") else 0


def logits_bytes(tokens: int, head: OutputHead, compute: torch.dtype, memory: int | None) -> int:
    """Peak bytes of the logits of a micro-batch, which are computed in chunks, and of their gradients.

    The backward holds two float32 copies of a chunk, a third one for a soft cap, and one in the forward's dtype if that
    is shorter.

    Args:
        tokens: Number of tokens with logits.
        head: Output head with V logits.
        compute: dtype of the matrix product.
        memory: Memory of the GPU in bytes; None is a CPU.
    """
    vocabulary = head.weight.shape[0]
    chunk = min(tokens, rows_per_chunk(vocabulary, memory))
    shorter_copy = 0 if compute is torch.float32 else compute.itemsize
    return chunk * vocabulary * (8 + (0 if head.soft_cap is None else 4) + shorter_copy)


def kv_bytes(config: PretrainedConfig, dtype: torch.dtype, tensor_parallel_size: int = 1) -> int:
    """Bytes of the keys and values of one token in all layers, per device; layers that keep a state have none.

    Args:
        config: Config of the model.
        dtype: dtype of the cache.
        tensor_parallel_size: Number of devices over which the heads are split.
    """
    text: Any = config.get_text_config()
    layers = sum(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=text).layers)
    if layers == 0:
        return 0
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * layers * max(int(heads) // tensor_parallel_size, 1) * int(width) * dtype.itemsize


def largest_micro_batch(
    budget: int, prompt: int, completion: int, samples: int, group_size: int, shared_prefix: bool
) -> BatchShape:
    """The micro-batch that fills a token budget with the longest possible samples.

    Args:
        budget: Tokens, padding included; a single sample may exceed it.
        prompt: Tokens of the longest prompt.
        completion: Maximum number of tokens of a completion.
        samples: Samples of one optimizer step.
        group_size: Samples of a prompt.
        shared_prefix: Whether each micro-batch has a single prompt and uses the shared-prefix forward.
    """
    most, full = (group_size, completion) if shared_prefix else (samples, prompt + completion - 1)
    room = max(budget - prompt, 1) if shared_prefix else budget
    rows = max(1, min(most, -(-room // full)))
    length = min(full, room // rows) if rows > 1 else full
    if not shared_prefix and length < prompt:  # rows of this length would hold no completion
        rows, length = max(1, room // full), full
    return BatchShape(rows, prompt, max(1, length if shared_prefix else length - prompt + 1), shared_prefix)
