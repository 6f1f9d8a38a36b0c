"""Log-probs and entropies of sampled tokens, without padding work and without ever holding all logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlmt.distributed.fsdp2 import call_as_forward
from rlmt.models.micro_batch import MicroBatch, hidden_states
from rlmt.types import PolicyOutputs

LOGITS_PER_CHUNK = 2**25
"""Logits in memory at a time, per copy: 128 MiB in float32."""


def token_logprobs(model: PreTrainedModel, batch: MicroBatch, temperature: float) -> PolicyOutputs:
    """Log-prob and entropy of every completion token of a micro-batch at the sampling temperature.

    The output projection is applied to the positions that predict completion tokens only, a chunk at a time.

    Returns:
        [t] float32 each, with gradients if they are enabled.
    """
    return PolicyOutputs(*call_as_forward(model, _token_logprobs, batch, temperature))


def _token_logprobs(model: Any, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    hidden = hidden_states(model.get_decoder(), batch)
    head = model.get_output_embeddings()
    chunk = max(1, LOGITS_PER_CHUNK // head.weight.shape[0])
    outputs = linear_logprobs(hidden, head.weight, batch.targets, temperature, chunk)
    return outputs.logprobs, outputs.entropy


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int) -> PolicyOutputs:
    """Log-probs and entropies under softmax(hidden · weightᵀ / temperature), `chunk` tokens at a time.

    Args:
        hidden: [t, H].
        weight: [V, H] output projection.
        targets: [t] int64.
        temperature: > 0.
        chunk: tokens whose logits exist at one time.

    Returns:
        [t] float32 log-probs and entropies in nats.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # here, since backward, which makes the logits again, runs outside of autocast
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    logprobs, entropy = cast(Any, _LinearLogprobs).apply(hidden, weight, targets, temperature, chunk)
    return PolicyOutputs(logprobs, entropy)


class _LinearLogprobs(torch.autograd.Function):
    """Forward keeps one number a token; backward makes each chunk's logits again and adds up the two gradients."""

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
            del logits, probabilities  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, targets, normalizer, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logprob_grad, entropy_grad = grads
        hidden, weight, targets, normalizer, entropy = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.zeros_like(hidden) if want_hidden else None
        weight_grad = torch.zeros_like(weight) if want_weight else None
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
            del logs, p, logit_grad  # before the next chunk's are made
        return hidden_grad, weight_grad, None, None, None


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, total, size)]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, then each module's own mode again: a frozen part may be in eval mode while the rest trains."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
