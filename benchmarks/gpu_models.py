"""Models with random weights on the device, clocks and counts of operations for benchmarks/gpu.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_report import Report
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from rlmt.types import FinishReason, RolloutBatch, Sampling

GIB = 2**30
SHAPES: dict[str, dict[str, int]] = {
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, vocab=128256),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, vocab=128256),
    "tiny": dict(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab=2048,
    ),
}
"""Llama 3.1 8B, Llama 3.2 1B, and a model for two CPU cores whose heads vLLM's CPU build can run."""


BF16_PEAKS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362, "L4": 121,
    "RTX 4090": 165,
}  # fmt: skip
"""Teraflops of dense bfloat16 by the makers' data sheets, by a part of the card's name."""


@dataclass(frozen=True)
class Setup:
    """What a part measures with, and where it reports."""

    size: str
    """Key of `SHAPES`."""
    device_type: str
    """cuda or cpu."""
    folder: Path
    """Folder for the files of runs."""
    report: Report

    @property
    def device(self) -> torch.device:
        """The device; with its index, as the device of a tensor on it."""
        return torch.device(self.device_type, 0) if self.on_gpu else torch.device("cpu")

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device_type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of models: bfloat16 on a GPU, and float32 on a CPU, where equalities hold to the last digits."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    def scale(self, on_gpu: int, on_cpu: int) -> int:
        """The first number for models with a real vocabulary, the second for the tiny one."""
        return on_cpu if self.size == "tiny" else on_gpu

    def config(self, layers: int | None = None, **options: Any) -> LlamaConfig:
        """Config of the model.

        Args:
            layers: Number of layers; None is that of the shape.
            **options: Further entries.
        """
        shape = {"num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": False}
        shape |= SHAPES[self.size] | ({} if layers is None else {"num_hidden_layers": layers}) | options
        config_class: Any = LlamaConfig
        return config_class(vocab_size=shape.pop("vocab"), **shape)  # type: ignore[no-any-return]

    def model(self, layers: int | None = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """A policy with random weights, in eval mode, on the device."""
        return random_model(self.config(layers), self.device, dtype or self.dtype)

    def matmul_flops(self, size: int) -> float:
        """Operations per second of a product of two square matrices in bfloat16 on a GPU, in float32 on a CPU."""
        a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        return 2.0 * size**3 / self.seconds(lambda: a @ b)

    def peak_flops(self) -> float:
        """Operations per second that a model is measured against: of the card by its data sheet, or a product's."""
        return data_sheet_flops(self) or self.matmul_flops(self.scale(8192, 512))

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], repeat: int = 3) -> float:
        """The least time of `repeat` calls, after one that is not timed."""
        work()
        times = []
        for _ in range(repeat):
            self.synchronize()
            began = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    def speed_and_peak(self, name: str, tokens: int, work: Callable[[], Any], repeat: int = 2) -> float:
        """Reports tokens per second of `work`, and on a GPU the peak that it allocates; returns the seconds."""
        seconds = self.seconds(work, repeat)
        self.report.row(name, tokens / seconds, "tokens/s")
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            torch.cuda.synchronize()
            self.report.row(f"{name}, peak", (torch.cuda.max_memory_allocated() - before) / GIB, "GiB")
        return seconds


MEAN_GAP, LARGEST_GAP = 0.15, 1.0
"""Nats by which log-probs of the 8B model may differ between two ways to compute them in bfloat16.

Random weights amplify its rounding. On a CPU bfloat16 is off from float32 by 0.013 on average with 2 layers, and by
0.030 with 8, which makes 0.06 with 32. A fault is larger: without rotary embeddings 2 layers are off by 1.1."""


def report_gaps(setup: Setup, name: str, gaps: Tensor) -> None:
    """Reports the mean and the largest of differences between log-probs."""
    gaps = gaps.abs()
    setup.report.equal(f"{name}, mean", float(gaps.mean()), MEAN_GAP if setup.on_gpu else 1e-3, "nats")
    setup.report.equal(f"{name}, largest", float(gaps.max()), LARGEST_GAP if setup.on_gpu else 1e-3, "nats")


@contextmanager
def card_memory() -> Iterator[list[int]]:
    """Samples the bytes in use on the whole GPU, 20 times a second; yields a list with the most, 0 without a GPU."""
    most, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.05):
            free, total = torch.cuda.mem_get_info()
            most[0] = max(most[0], total - free)

    thread = threading.Thread(target=sample)
    if torch.cuda.is_available():
        thread.start()
    try:
        yield most
    finally:
        done.set()
        if torch.cuda.is_available():
            thread.join()


def data_sheet_flops(setup: Setup) -> float | None:
    """Operations per second of the card by its maker; None if it is not listed."""
    name = torch.cuda.get_device_name() if setup.on_gpu else ""
    return next((teraflops * 1e12 for part, teraflops in BF16_PEAKS.items() if part in name), None)


def random_model(
    config: LlamaConfig, device: torch.device, dtype: torch.dtype, auto: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """A model with random weights from a fixed seed, made on the device, in eval mode."""
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def quantize(model: Any, double_quant: bool) -> PreTrainedModel:
    """Replaces the linear layers of a random model, except its head, by layers in NF4, one at a time."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings() if hasattr(model, "lm_head") else model.score
    linear = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child is not head
    ]
    for parent, name, child in linear:
        options = {"compress_statistics": double_quant, "quant_type": "nf4"}
        layer = Linear4bit(
            child.in_features, child.out_features, bias=False, compute_dtype=model.dtype, device="meta", **options
        )
        device, weight = child.weight.device, child.weight.data
        layer.weight = Params4bit(weight.cpu() if device.type == "cpu" else weight, requires_grad=False, **options)
        setattr(parent, name, layer.to(device))
        child.weight = None
    model.config.quantization_config = None
    return model  # type: ignore[no-any-return]


def batch_of(setup: Setup, prompts: int, group_size: int, prompt: int, completion: int) -> RolloutBatch:
    """Random rollouts, all of one length."""
    make = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, SHAPES[setup.size]["vocab"], (count,), generator=make).tolist()

    samples = prompts * group_size
    return RolloutBatch(
        prompts=[],
        group_size=group_size,
        prompt_ids=[tokens(prompt) for _ in range(prompts)],
        completion_ids=[tokens(completion) for _ in range(samples)],
        engine_logprobs=torch.zeros(samples * completion),
        finish=[FinishReason.STOP] * samples,
        sampling=Sampling(1.0, completion),
        weight_version=0,
    )


def update_flops(config: Any, rows: int, prompt: int, completion: int, trained: int, lora: bool) -> float:
    """Operations of a forward and backward over rows of equal length; recomputed activations do not count.

    A matrix product of m × k with k × n takes 2mkn. Backward takes as many for the gradient of the input, and again as
    many for that of a trained weight. Attention is causal: half of its products are not needed.

    Args:
        config: Config of a Llama.
        rows: Samples, each with its own prompt.
        prompt: Tokens of a prompt.
        completion: Tokens of a completion; only they have logits.
        trained: Parameters of adapters.
        lora: Whether all weights but those of adapters are frozen.
    """
    hidden, length = config.hidden_size, prompt + completion - 1
    head_dim = hidden // config.num_attention_heads
    projections = 2 * hidden * hidden + 2 * hidden * config.num_key_value_heads * head_dim
    layer = projections + 3 * hidden * config.intermediate_size
    linear = 2.0 * rows * (length * config.num_hidden_layers * layer + completion * hidden * config.vocab_size)
    attention = 2.0 * rows * config.num_hidden_layers * length * length * hidden  # two products, half of each
    adapters = 2.0 * rows * length * trained
    return (2 if lora else 3) * linear + 3 * attention + 3 * adapters


def relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of gradients, relative to the norm of each, in float64; NaN if one is missing."""
    if ours.keys() != theirs.keys():
        return float("nan")

    def gap(name: str) -> float:
        a, b = ours[name].double().cpu(), theirs[name].double().cpu()
        return float((a - b).norm() / b.norm().clamp_min(1e-30))

    return max(map(gap, theirs))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a model; they are cleared."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
