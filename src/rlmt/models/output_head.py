"""Log-probs and entropies from hidden states and the output projection, without all logits in memory at once."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from rlmt.types import PolicyOutputs

LOGITS_PER_CHUNK = 2**25
"""Number of logits in memory at a time, per copy: 128 MiB in float32."""


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int) -> PolicyOutputs:
    """Computes log-probs and entropies under softmax(hidden · weightᵀ / temperature), `chunk` tokens at a time.

    Args:
        hidden: [t, H] hidden states.
        weight: [V, H] output projection.
        targets: [t] int64 token ids.
        temperature: Sampling temperature, > 0.
        chunk: Number of tokens whose logits are in memory at a time.

    Returns:
        [t] float32 log-probs and [t] float32 entropies, in nats.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # cast here, because backward recomputes the logits outside of autocast
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    logprobs, entropy = cast(Any, _LinearLogprobs).apply(hidden, weight, targets, temperature, chunk)
    return PolicyOutputs(logprobs, entropy)


class _LinearLogprobs(torch.autograd.Function):
    """Forward saves the log-normalizer and the entropy of each token; backward recomputes the logits by chunks."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy, normalizer = torch.empty_like(logprobs), torch.empty_like(logprobs)
        projection = weight.to(hidden.dtype)
        for part in _chunks(len(hidden), chunk):
            logits = (hidden[part] @ projection.T).float().div_(temperature)
            lse = logits.logsumexp(dim=1)
            logprobs[part] = logits.gather(1, targets[part, None]).squeeze(1) - lse
            probabilities = (logits - lse[:, None]).exp_()
            entropy[part] = lse - (probabilities.mul_(logits)).sum(dim=1)
            normalizer[part] = lse
            del logits, probabilities  # frees them before the next chunk's are allocated
        ctx.save_for_backward(hidden, weight, targets, normalizer, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logprob_grad, entropy_grad = grads
        hidden, weight, targets, normalizer, entropy = ctx.saved_tensors
        needs_hidden_grad, needs_weight_grad = ctx.needs_input_grad[:2]
        hidden_grad = torch.zeros_like(hidden) if needs_hidden_grad else None
        weight_grad = torch.zeros_like(weight) if needs_weight_grad else None
        projection = weight.to(hidden.dtype)
        for part in _chunks(len(hidden), ctx.chunk):
            logs = (hidden[part] @ projection.T).float().div_(ctx.temperature).sub_(normalizer[part, None])
            p = logs.exp()
            # d logprob / d logit_v = [v = target] - p_v;  d entropy / d logit_v = -p_v (log p_v + entropy)
            slope = torch.zeros_like(normalizer[part]) if logprob_grad is None else logprob_grad[part].float()
            if entropy_grad is None:
                logit_grad = p.mul_(-slope[:, None])
            else:
                down = entropy_grad[part].float()[:, None]
                logit_grad = p.mul_(logs.add_(entropy[part, None]).mul_(-down).sub_(slope[:, None]))
            logit_grad.scatter_add_(1, targets[part, None], slope[:, None])
            logit_grad = logit_grad.div_(ctx.temperature).to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad[part] = logit_grad @ projection
            if weight_grad is not None:
                weight_grad.add_((logit_grad.T @ hidden[part]).to(weight.dtype))
            del logs, p, logit_grad  # frees them before the next chunk's are allocated
        return hidden_grad, weight_grad, None, None, None


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, total, size)]
