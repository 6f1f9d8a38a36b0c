"""Log-probs and entropies from hidden states and the output head, without all logits in memory at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from rlmt.annotations import PreTrainedModel
from rlmt.models.logits_function import logits_function
from rlmt.types import PolicyOutputs

LOGITS_PER_CHUNK = 2**25
"""Number of logits in memory at a time on a CPU, per copy: 128 MiB in float32."""
_BYTES_PER_LOGIT = 10
"""In backward on a GPU: two copies in float32, one in bfloat16."""
_MEMORY_SHARE = 64
"""Logits take at most this part of a GPU's memory."""
_TILE, _MOST_ROWS = 128, 2048
"""Rows that a matrix product on a GPU computes at a time, and rows from which more make it no faster."""


@dataclass(frozen=True)
class OutputHead:
    """Logits from hidden states: z = scale · (hidden · weightᵀ + bias), with a soft cap c then c · tanh(z / c)."""

    weight: Tensor
    """[V, H] output projection."""
    bias: Tensor | None = None
    """[V], or None."""
    scale: float = 1.0
    """Factor of the products (Cohere, Granite)."""
    soft_cap: float | None = None
    """Bound of the logits (Gemma 2), or None."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Computes float32 logits [t, V] from hidden states [t, H]; the projection runs in their dtype."""
        logits = (hidden @ self.weight.to(hidden.dtype).T).float()
        if self.bias is not None:
            logits += self.bias.float()
        if self.scale != 1:
            logits *= self.scale
        return logits if self.soft_cap is None else logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)


def output_head(model: PreTrainedModel) -> OutputHead:
    """The output head of a causal language model.

    Raises:
        UserError: The model computes its logits in another way.
    """
    scale, soft_cap = logits_function(model)
    projection: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return OutputHead(projection.weight, projection.bias, scale, soft_cap)


def rows_per_chunk(vocabulary: int, memory: int | None) -> int:
    """Number of tokens whose logits are in memory at a time.

    It depends on the size of the device and not on its free memory, so that a resumed run computes the same sums.

    Args:
        vocabulary: Number of logits of a token.
        memory: Memory of the GPU in bytes; None on a CPU.
    """
    if memory is None:
        return max(1, LOGITS_PER_CHUNK // vocabulary)
    rows = memory // _MEMORY_SHARE // (_BYTES_PER_LOGIT * vocabulary)
    return min(max(rows // _TILE, 1) * _TILE, _MOST_ROWS)


def device_memory(device: torch.device) -> int | None:
    """Memory of a GPU in bytes; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def linear_logprobs(hidden: Tensor, head: OutputHead, targets: Tensor, temperature: float, chunk: int) -> PolicyOutputs:
    """Computes log-probs and entropies under softmax(logits / temperature), `chunk` tokens at a time.

    Args:
        hidden: [t, H] hidden states.
        head: Output head with V logits.
        targets: [t] int64 token ids.
        temperature: Sampling temperature, > 0.
        chunk: Number of tokens whose logits are in memory at a time.

    Returns:
        [t] float32 log-probs and [t] float32 entropies, in nats.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # cast here, because backward recomputes the logits outside of autocast
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    apply = cast(Any, _LinearLogprobs).apply
    logprobs, entropy = apply(hidden, head.weight, head.bias, head, targets, temperature, chunk)
    return PolicyOutputs(logprobs, entropy)


class _LinearLogprobs(torch.autograd.Function):
    """Forward saves the log-normalizer and the entropy of each token; backward recomputes the logits by chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: OutputHead,
        targets: Tensor,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy, normalizer = torch.empty_like(logprobs), torch.empty_like(logprobs)
        cast_head = replace(head, weight=weight.to(hidden.dtype), bias=bias)
        for part in _chunks(len(hidden), chunk):
            logits = cast_head.logits(hidden[part]).div_(temperature)
            lse = logits.logsumexp(dim=1)
            logprobs[part] = logits.gather(1, targets[part, None]).squeeze(1) - lse
            probabilities = (logits - lse[:, None]).exp_()
            entropy[part] = lse - (probabilities.mul_(logits)).sum(dim=1)
            normalizer[part] = lse
            del logits, probabilities  # frees them before the next chunk's are allocated
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer, entropy)
        ctx.scale, ctx.soft_cap, ctx.temperature, ctx.chunk = head.scale, head.soft_cap, temperature, chunk
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logprob_grad, entropy_grad = grads
        hidden, weight, bias, targets, normalizer, entropy = ctx.saved_tensors
        grads_of = zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        hidden_grad, weight_grad, bias_grad = (torch.zeros_like(x) if needed else None for x, needed in grads_of)
        head = OutputHead(weight.to(hidden.dtype), bias, ctx.scale, ctx.soft_cap)
        for part in _chunks(len(hidden), ctx.chunk):
            logs = head.logits(hidden[part])
            # d c tanh(z / c) / dz = 1 - tanh(z / c)²
            cap_slope = None if head.soft_cap is None else (logs / head.soft_cap).square_().neg_().add_(1)
            logs = logs.div_(ctx.temperature).sub_(normalizer[part, None])
            p = logs.exp()
            # d logprob / d logit_v = [v = target] - p_v;  d entropy / d logit_v = -p_v (log p_v + entropy)
            slope = torch.zeros_like(normalizer[part]) if logprob_grad is None else logprob_grad[part].float()
            if entropy_grad is None:
                logit_grad = p.mul_(-slope[:, None])
            else:
                down = entropy_grad[part].float()[:, None]
                logit_grad = p.mul_(logs.add_(entropy[part, None]).mul_(-down).sub_(slope[:, None]))
            logit_grad.scatter_add_(1, targets[part, None], slope[:, None])
            logit_grad = logit_grad.div_(ctx.temperature)
            if cap_slope is not None:
                logit_grad *= cap_slope
            if head.scale != 1:
                logit_grad *= head.scale
            if bias_grad is not None:
                bias_grad += logit_grad.sum(0).to(bias_grad.dtype)
            logit_grad = logit_grad.to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad[part] = logit_grad @ head.weight
            if weight_grad is not None and weight_grad.dtype == hidden.dtype:
                weight_grad.addmm_(logit_grad.T, hidden[part])  # without a product of the size of the weight
            elif weight_grad is not None:
                weight_grad += logit_grad.T @ hidden[part]
            del logs, p, logit_grad, cap_slope  # frees them before the next chunk's are allocated
        return hidden_grad, weight_grad, bias_grad, None, None, None, None


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, total, size)]
