"""Parts 2 and 7 of benchmarks/gpu.py: equality with the CPU and with float64, chunks of the output head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from gpu_models import Setup, batch_of, gradients, random_model, relative
from torch import Tensor
from transformers import PreTrainedModel

from rlmt.models.logprobs import token_logprobs
from rlmt.models.micro_batch import micro_batches
from rlmt.models.output_head import OutputHead, linear_logprobs
from rlmt.models.training_mode import set_training_mode
from rlmt.types import RolloutBatch


def against_cpu(setup: Setup) -> None:
    """Part 2: the loss and its gradient on the device against the CPU, and the output head against float64."""
    wide = {} if setup.size == "tiny" else dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
    config = setup.config(2, **wide)
    on_cpu = random_model(config, torch.device("cpu"), torch.float32).requires_grad_(True)
    set_training_mode(on_cpu, gradient_checkpointing=False, dropout=False)
    batch = batch_of(setup, prompts=2, group_size=3, prompt=24, completion=16)
    expected_loss, expected = loss_and_gradients(on_cpu, batch, share=False, device=torch.device("cpu"))
    on_device = copy.deepcopy(on_cpu).to(setup.device)  # type: ignore[arg-type]
    for share in (False, True):
        loss, found = loss_and_gradients(on_device, batch, share, setup.device)
        name = "shared prompts" if share else "own prompts"
        setup.report.equal(f"loss, float32, {name}, relative", abs(loss / expected_loss - 1), 1e-5)
        setup.report.equal(f"gradient, float32, {name}, relative", relative(found, expected), 1e-4)
    with torch.autocast(setup.device_type, torch.bfloat16):
        loss, found = loss_and_gradients(on_device, batch, True, setup.device)
    setup.report.equal("loss, bf16-mixed, relative", abs(loss / expected_loss - 1), 1e-2)
    setup.report.equal("gradient, bf16-mixed, relative", relative(found, expected), 0.1)
    del on_device
    for dtype, limits in ((torch.float32, (1e-3, 1e-4)), (torch.bfloat16, (0.1, 0.05))):
        head_against_float64(setup, dtype, *limits)


def loss_and_gradients(
    model: PreTrainedModel, batch: RolloutBatch, share: bool, device: torch.device
) -> tuple[float, dict[str, Tensor]]:
    """A weighted sum of log-probs and entropies, and its gradients; the sum does not depend on micro-batches."""
    total = 0.0
    for micro in micro_batches(batch, range(len(batch)), 120, share, device):
        outputs = token_logprobs(model, micro, 0.7)
        lengths = [batch.lengths[i] for i in micro.samples]
        weights = torch.cat([torch.arange(n) % 5 + 1.0 + i for i, n in zip(micro.samples, lengths, strict=True)])
        loss = -(weights.to(device) * (outputs.logprobs + 0.1 * outputs.entropy)).sum()
        with torch.autocast(device.type, enabled=False):
            loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total, gradients(model)


def head_against_float64(setup: Setup, dtype: torch.dtype, logprob_limit: float, gradient_limit: float) -> None:
    """Log-probs and gradients of the output head against all logits in float64, from the same rounded inputs."""
    tokens, config = setup.scale(256, 64), setup.config()
    hidden, weight, targets = head_inputs(setup, tokens, dtype)
    names = ("hidden", "weight")

    def run(states: Tensor, matrix: Tensor, exact: bool) -> tuple[Tensor, dict[str, Tensor]]:
        states, matrix = states.requires_grad_(True), matrix.requires_grad_(True)
        if exact:
            logprobs = torch.log_softmax(states @ matrix.T, dim=1).gather(1, targets[:, None]).squeeze(1)
        else:
            logprobs = linear_logprobs(states, OutputHead(matrix), targets, 1.0, tokens // 3).logprobs
        weights = torch.linspace(-1, 1, tokens, device=setup.device)
        grads = torch.autograd.grad((logprobs * weights).sum(), (states, matrix))
        return logprobs.detach(), dict(zip(names, grads, strict=True))

    logprobs, found = run(hidden.clone(), weight.clone(), exact=False)
    expected_logprobs, expected = run(hidden.double(), weight.double(), exact=True)
    kind = f"{str(dtype).removeprefix('torch.')}, {config.vocab_size:,} tokens"
    gap = float((logprobs.double() - expected_logprobs).abs().max())
    setup.report.equal(f"head against float64, log-prob, {kind}", gap, logprob_limit, "nats")
    setup.report.equal(f"head against float64, gradient, {kind}, relative", relative(found, expected), gradient_limit)


def head_inputs(setup: Setup, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [t, H], weight [V, H] and targets [t], with logits of standard deviation 1 or so."""
    config, make = setup.config(), torch.Generator(setup.device).manual_seed(0)
    options: dict[str, Any] = {"device": setup.device, "generator": make}
    hidden = torch.randn(tokens, config.hidden_size, **options).to(dtype)
    weight = torch.randn(config.vocab_size, config.hidden_size, **options).mul_(config.hidden_size**-0.5).to(dtype)
    return hidden, weight, torch.randint(config.vocab_size, (tokens,), **options)


def head_chunks(setup: Setup) -> None:
    """Part 7: seconds and memory of the output head's forward and backward by the size of its chunks."""
    tokens = setup.scale(8192, 256)
    hidden, weight, targets = head_inputs(setup, tokens, setup.dtype)
    hidden.requires_grad_(True)
    for trained in (False, True):
        weight.requires_grad_(trained)
        for chunk in (tokens // 32, tokens // 8, tokens // 4, tokens):

            def work(chunk: int = chunk) -> None:
                outputs = linear_logprobs(hidden, OutputHead(weight), targets, 1.0, chunk)
                (outputs.logprobs.sum() + outputs.entropy.sum()).backward()
                hidden.grad = weight.grad = None

            name = f"head, chunks of {chunk}, {'trained' if trained else 'frozen'} weight"
            setup.speed_and_peak(name, tokens, work)
