"""Parts 10 and 11 of benchmarks/gpu.py: the engines that run in the trainer's process."""

from __future__ import annotations

import time
from typing import Any

import torch
from gpu_cli import model_folders, tiny_folder
from gpu_models import GIB, MEAN_GAP, Setup, report_gaps
from transformers import PreTrainedModel

from rlmt.engines import Engine, TransformersEngine, VLLMEngine
from rlmt.models import LoRA
from rlmt.models.adapters import adapter_weights, base_tensors
from rlmt.models.loading import load_tokenizer
from rlmt.models.logprobs import compute_logprobs
from rlmt.types import RolloutBatch, SampleRequest, Samples, Sampling

SYNCS = 20
"""Number of weight syncs of part 11."""


def transformers_engine(setup: Setup) -> None:
    """Part 10: tokens per second, and the log-probs of its samples against those of the trainer."""
    model, engine = setup.model(), TransformersEngine()
    engine.start(model, load_tokenizer(tiny_folder(setup) / "policy"), 2048, setup.dtype)
    engine.sync([], 0)
    tokens = setup.scale(64, 16)
    requests = [SampleRequest(list(range(10, 42 + n)), [8 * n + k for k in range(8)]) for n in range(setup.scale(8, 2))]
    engine.generate(requests[:1], Sampling(1.0, 4))  # loads kernels
    sampled, seconds = generate(setup, engine, requests, Sampling(1.0, tokens))
    setup.report.row("TransformersEngine", sum(sampled.lengths) / seconds, "tokens/s")
    report_gaps(setup, "TransformersEngine against the trainer, log-prob", logprob_gap(setup, model, sampled))


def generate(
    setup: Setup, engine: Engine, requests: list[SampleRequest], sampling: Sampling
) -> tuple[RolloutBatch, float]:
    """Samples of an engine as a rollout batch, and the seconds that it took."""
    setup.synchronize()
    began = time.perf_counter()
    samples: Samples = engine.generate(requests, sampling)
    setup.synchronize()
    batch = RolloutBatch(
        prompts=[],
        group_size=len(requests[0].seeds),
        prompt_ids=[request.prompt_ids for request in requests],
        completion_ids=samples.completion_ids,
        engine_logprobs=torch.tensor([x for row in samples.logprobs for x in row]),
        finish=samples.finish,
        sampling=sampling,
        weight_version=samples.weight_version,
    )
    return batch, time.perf_counter() - began


def logprob_gap(setup: Setup, model: PreTrainedModel, batch: RolloutBatch) -> torch.Tensor:
    """[T] differences between the log-probs of engine and trainer."""
    with torch.autocast(setup.device_type, torch.bfloat16, enabled=setup.on_gpu):
        ours = compute_logprobs(model, batch, 8192, setup.device)
    return (ours.cpu() - batch.engine_logprobs).abs()


def vllm_engine(setup: Setup) -> None:
    """Part 11: vLLM in the trainer's process, over many syncs of weights, then with a LoRA adapter."""
    policy, _ = model_folders(setup)
    model = setup.model()
    weights = sum(t.numel() * t.element_size() for t in base_tensors(model).values()) / GIB
    memory = torch.cuda.get_device_properties(0).total_memory / GIB if setup.on_gpu else 1.0
    share = min(0.9, (weights + 8) / memory) if setup.on_gpu else 0.45
    for name, syncs in (("vLLM", SYNCS), ("vLLM with LoRA", 3)):
        if name.endswith("LoRA"):
            LoRA().add_to(model)
        engine = VLLMEngine(gpu_memory_utilization=share, enforce_eager=True, max_num_seqs=64)
        began = time.perf_counter()
        engine.start(model, load_tokenizer(policy), 1024, setup.dtype)
        setup.report.row(f"{name}, start", time.perf_counter() - began, "s")
        try:
            sync_and_sample(setup, name, engine, model, syncs)
        finally:
            engine.close()
        report_memory(setup, f"{name}, closed")


def sync_and_sample(setup: Setup, name: str, engine: VLLMEngine, model: Any, syncs: int) -> None:
    """Changes the weights, wakes and syncs the engine, samples, and compares log-probs; again and again."""
    gaps, times, seconds, tokens = [], [], 0.0, 0
    requests = [SampleRequest(list(range(10, 42 + n)), [8 * n + k for k in range(8)]) for n in range(setup.scale(8, 2))]
    for version in range(syncs):
        changed = [p for n, p in model.named_parameters() if ".lora_B." in n] or [model.lm_head.weight]
        torch.manual_seed(version)
        for parameter in changed:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.002)
        setup.synchronize()
        began = time.perf_counter()
        engine.sync(iter(base_tensors(model).items()), version, adapter_weights(model))
        setup.synchronize()
        times.append(time.perf_counter() - began)
        if version in (0, syncs - 1):
            report_memory(setup, f"{name}, awake, sync {version + 1}")
        batch, took = generate(setup, engine, requests, Sampling(1.0, setup.scale(32, 16)))
        seconds, tokens = seconds + took, tokens + sum(batch.lengths)
        gaps.append(float(logprob_gap(setup, model, batch).mean()))
        if version in (0, syncs - 1):
            report_memory(setup, f"{name}, asleep, sync {version + 1}")
    setup.report.row(f"{name}, sync, mean of {syncs}", sum(times) / syncs, "s")
    setup.report.row(f"{name}, samples and sleep", tokens / seconds, "tokens/s")
    limit = MEAN_GAP if setup.on_gpu else 1e-3
    setup.report.equal(f"{name}, log-prob against the trainer, mean, worst of {syncs} syncs", max(gaps), limit, "nats")


def report_memory(setup: Setup, when: str) -> None:
    """Reports the memory in use on the whole GPU."""
    if setup.on_gpu:
        free, total = torch.cuda.mem_get_info()
        setup.report.row(f"{when}, memory in use", (total - free) / GIB, "GiB")
