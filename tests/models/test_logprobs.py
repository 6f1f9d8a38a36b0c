"""Log-probs of sampled tokens equal log_softmax of full logits."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rlmt.models.logprobs import token_logprobs
from rlmt.models.micro_batch import micro_batches
from rlmt.models.output_head import OutputHead, linear_logprobs, rows_per_chunk
from rlmt.types import RolloutBatch, Sampling

SHAPE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "soft cap": {"soft_cap": 2.5},
    "all": {"bias": True, "scale": 1.7, "soft_cap": 4.0},
}


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_linear_logprobs_equal_log_softmax_in_value_and_gradient(
    options: dict[str, Any], chunk: int, temperature: float
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(13, dtype=torch.float64, requires_grad=True) if "bias" in options else None
    targets = torch.randint(0, 13, (10,))
    a, b = torch.randn(10), torch.randn(10)
    inputs = [hidden, weight] if bias is None else [hidden, weight, bias]

    products = torch.nn.functional.linear(hidden, weight, bias) * options.get("scale", 1)
    cap = options.get("soft_cap")
    logits = products if cap is None else cap * torch.tanh(products / cap)
    logs = torch.log_softmax(logits / temperature, dim=1)
    expected = logs.gather(1, targets[:, None]).squeeze(1)
    expected_entropy = -(logs.exp() * logs).sum(1)
    expected_grads = torch.autograd.grad((a * expected + b * expected_entropy).sum(), inputs)

    head = OutputHead(weight, bias, options.get("scale", 1), cap)
    out = linear_logprobs(hidden, head, targets, temperature, chunk)
    torch.testing.assert_close(out.logprobs, expected.float())
    torch.testing.assert_close(out.entropy, expected_entropy.float())
    grads = torch.autograd.grad((a * out.logprobs + b * out.entropy).sum(), inputs)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("which", ["logprobs", "entropy"])
def test_each_output_has_its_own_gradient(which: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(9, 4)
    targets = torch.randint(0, 9, (5,))
    logs = torch.log_softmax(hidden @ weight.T, dim=1)
    expected = logs.gather(1, targets[:, None]).sum() if which == "logprobs" else -(logs.exp() * logs).sum()
    (want,) = torch.autograd.grad(expected, hidden)
    (got,) = torch.autograd.grad(
        getattr(linear_logprobs(hidden, OutputHead(weight), targets, 1.0, 2), which).sum(), hidden
    )
    torch.testing.assert_close(got, want)


def test_backward_recomputes_the_logits_of_forward_under_autocast() -> None:
    """A column of ones in the projection has no effect on log-probs: its input has gradient Σ d logprob/d logit = 0."""
    torch.manual_seed(0)
    hidden = (torch.randn(64, 32) * 4).requires_grad_()
    weight = torch.randn(500, 32)
    weight[:, 0] = 1
    targets = torch.randint(0, 500, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprobs(hidden, OutputHead(weight), targets, 1.0, 16)
        expected = torch.log_softmax(torch.nn.functional.linear(hidden, weight).float(), 1)
    torch.testing.assert_close(out.logprobs, expected.gather(1, targets[:, None]).squeeze(1))
    (gradient,) = torch.autograd.grad(out.logprobs.sum(), hidden)
    assert gradient[:, 0].abs().max() < 0.01
    assert gradient[:, 1:].abs().mean() > 0.1


def test_peak_memory_is_a_few_chunks_of_logits(allocated_peak: Any) -> None:
    """All logits of 1,024 tokens × 8,192 vocabulary entries take 32 MiB; those of chunks of 64 tokens take 2 MiB."""
    hidden = torch.randn(1024, 16, requires_grad=True)
    weight = torch.randn(8192, 16, requires_grad=True)
    targets = torch.randint(0, 8192, (1024,))

    def work() -> None:
        out = linear_logprobs(hidden, OutputHead(weight), targets, 0.7, 64)
        (out.logprobs.sum() + out.entropy.sum()).backward()

    one_chunk = 64 * 8192 * 4
    assert one_chunk < allocated_peak(work) < 4 * one_chunk


@pytest.mark.parametrize(
    ("gib", "vocabulary", "rows"),
    [
        (None, 128256, 261),  # 2^25 logits
        (8, 128256, 128),  # 8 GiB / 64 / (10 bytes · 128,256) = 105, and at least one tile
        (22.0, 128256, 256),  # 288 in tiles of 128
        (79.1, 128256, 1024),  # 1,034
        (79.1, 151936, 768),  # 873
        (139.7, 32000, 2048),  # 7,324, and more rows are not faster
    ],
)
def test_rows_of_a_chunk_follow_from_the_memory_of_the_card(gib: float | None, vocabulary: int, rows: int) -> None:
    assert rows_per_chunk(vocabulary, None if gib is None else int(gib * 2**30)) == rows


def test_weight_gradient_is_accumulated_in_place(allocated_peak: Any) -> None:
    """A weight of 8 MiB: its gradient takes as much, and a product of its size for each chunk would take 8 MiB more."""
    hidden = torch.randn(64, 256, requires_grad=True)
    weight = torch.randn(8192, 256, requires_grad=True)
    targets = torch.randint(0, 8192, (64,))
    out = linear_logprobs(hidden, OutputHead(weight), targets, 1.0, 16)
    peak = allocated_peak(lambda: out.logprobs.sum().backward())
    assert 8 * 2**20 < peak < 12 * 2**20


def test_gradient_of_a_float32_weight_under_autocast_is_summed_in_float32() -> None:
    """300 chunks of one token with equal gradients: a sum in bfloat16 would stop at 256 of them."""
    torch.manual_seed(0)
    hidden = torch.ones(300, 8, requires_grad=True)
    weight = torch.zeros(4, 8, requires_grad=True)
    targets = torch.zeros(300, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprobs(hidden, OutputHead(weight), targets, 1.0, 1)
    out.logprobs.sum().backward()  # type: ignore[no-untyped-call]
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25])[:, None].expand(4, 8) * 300
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2"])
@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("budget", [1, 1000])
def test_token_logprobs_equal_a_forward_pass_per_sample(family: str, share_prompts: bool, budget: int) -> None:
    torch.manual_seed(0)
    model = (
        Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=2))
        if family == "qwen2"
        else LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=family == "llama_tied"))
    )
    rollouts = RolloutBatch(
        prompts=[],
        group_size=2,
        prompt_ids=[[1, 2, 3], [4]],
        completion_ids=[[10, 11], [12, 13, 14, 15, 16, 17], [18], [19]],
        engine_logprobs=torch.zeros(10),
        finish=[],
        sampling=Sampling(0.7, 8),
        weight_version=0,
    )
    seen = {}
    for batch in micro_batches(rollouts, range(4), budget, share_prompts, torch.device("cpu")):
        parts = token_logprobs(model, batch, 0.7).logprobs.split(
            [len(rollouts.completion_ids[i]) for i in batch.samples]
        )
        seen |= dict(zip(batch.samples, parts, strict=True))
    for i, completion in enumerate(rollouts.completion_ids):
        prompt = rollouts.prompt_ids[i // 2]
        logs = torch.log_softmax(model(torch.tensor([prompt + completion])).logits[0] / 0.7, dim=-1)
        expected = torch.stack([logs[len(prompt) + k - 1, token] for k, token in enumerate(completion)])
        torch.testing.assert_close(seen[i], expected, rtol=1e-5, atol=1e-5)


def test_micro_batches_cover_every_sample_once_within_the_budget() -> None:
    lengths = [5, 9, 2, 30, 1, 7]
    rollouts = RolloutBatch(
        prompts=[],
        group_size=3,
        prompt_ids=[[0] * 4, [0] * 10],
        completion_ids=[[0] * n for n in lengths],
        engine_logprobs=torch.zeros(54),
        finish=[],
        sampling=Sampling(1.0, 30),
        weight_version=0,
    )
    ways = [
        (True, False, 20),
        (False, False, 20),
        (True, False, 1),
        (False, False, 1),
        (False, True, 20),
        (False, True, 1),
    ]
    for share, packed, budget in ways:
        batches = list(micro_batches(rollouts, range(6), budget, share, torch.device("cpu"), packed=packed))
        assert sorted(i for batch in batches for i in batch.samples) == list(range(6))
        for batch in batches:
            tokens = batch.input_ids.numel() + (0 if batch.shared_prompt is None else batch.shared_prompt.numel())
            assert tokens <= budget or len(batch.samples) == 1
            assert (batch.shared_prompt is not None) == share
