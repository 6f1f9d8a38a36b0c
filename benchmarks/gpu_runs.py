"""Parts 3, 4, 5, 6, 9 and 12 of benchmarks/gpu.py: training runs of the `rlmt` command."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_cli import AFTER_STEP, fit, model_folders, tiny_folder, write_replay
from gpu_forwards import compare_forwards
from gpu_models import GIB, MEAN_GAP, Setup, card_memory, update_flops
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rlmt.memory.budget import CUDA_CONTEXT, make_budget
from rlmt.modules import RLMTModule

LENGTH_REWARD = {
    "--model.reward": "LengthWindow",
    "--model.reward.min_chars": 1,
    "--model.reward.max_chars": 2,
    "--model.reward.margin": 100000,
}
"""A reward that differs between synthetic samples and takes no time."""

# Part 3 ---------------------------------------------------------------------------------------------------------------


def kill_and_resume(setup: Setup) -> None:
    """Part 3: a run of 4 steps against one that is killed after 3 and resumed; step 4 is compared."""
    tiny = tiny_folder(setup)
    options: dict[str, object] = {
        "--model.policy": tiny / "policy",
        "--model.reward.model": tiny / "reward",
        "--data.prompts": tiny / "prompts.jsonl",
        "--data.engine": "TransformersEngine",
        "--data.batch_size": 4,
        "--data.group_size": 4,
        "--data.max_new_tokens": 24,
        "--trainer.max_steps": 4,
        "--trainer.precision": "bf16-mixed",
        "--trainer.deterministic": "warn",
    }
    checkpoints = {"class_path": "rlmt.callbacks.PolicyCheckpoint", "init_args": {"every_n_steps": 1}}
    killer = {"class_path": "gpu_cli.KillAfter", "init_args": {"steps": 3}}
    configs, callbacks = ("base", "grpo", "tiny"), {"--trainer.callbacks": json.dumps([checkpoints])}
    killed = options | {"--trainer.callbacks": json.dumps([checkpoints, killer])}
    process = multiprocessing.get_context("spawn").Process(target=fit, args=(setup, "killed", configs, killed))
    process.start()
    fit(setup, "uninterrupted", configs, options | callbacks)  # at the same time
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"the run was not killed after 3 steps: exit status {process.exitcode}")
    fit(setup, "killed", configs, options | callbacks | {"--ckpt_path": "last"})
    expected, found = (last_row(setup.folder / name) for name in ("uninterrupted", "killed"))
    if expected.keys() != found.keys() or len(expected) < 10:
        raise RuntimeError(f"step 4 has other metrics: {sorted(expected.keys() ^ found.keys())}")
    gaps = {name: abs(found[name] - value) / max(abs(value), 1e-3) for name, value in expected.items()}
    worst = max(gaps, key=gaps.__getitem__)
    setup.report.equal(f"step 4 after kill and resume, {len(gaps)} metrics, relative ({worst})", gaps[worst], 1e-3)


def last_row(folder: Path) -> dict[str, float]:
    """The last row of a run's metrics, without times."""
    files = sorted(folder.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime)
    rows = [row for file in files for row in csv.DictReader(file.read_text().splitlines())]
    steps = [row for row in rows if row.get("policy/loss")]
    skipped = ("time/", "perf/")
    return {name: float(value) for name, value in steps[-1].items() if value and not name.startswith(skipped)}


# Parts 4 and 5 --------------------------------------------------------------------------------------------------------


def lora_update(setup: Setup) -> None:
    """Part 4: the update of a LoRA policy, tokens per second and memory against the plan."""
    for tokens in (setup.scale(8192, 256), setup.scale(16384, 512)):
        options = {"--model.gradient_checkpointing": "true", "--trainer.precision": "bf16-mixed", **LENGTH_REWARD}
        measure_update(setup, f"LoRA update, {tokens:,} tokens", ("base", "grpo", "lora"), tokens, options)


def qlora_update(setup: Setup) -> None:
    """Part 5: the update with policy and reward model in 4 bits, and the paged optimizer."""
    _, reward = model_folders(setup)
    options: dict[str, object] = {
        "--model.reward.model": reward,
        "--model.optimizer": "bitsandbytes.optim.AdamW8bit",
        "--model.optimizer.min_8bit_size": 256,
    }
    tokens = setup.scale(8192, 256)
    measure_update(
        setup, f"QLoRA update, {tokens:,} tokens", ("base", "grpo", "llama-3.1-8b", "qlora"), tokens, options, "24 GB"
    )
    paged_optimizer(setup)


def measure_update(
    setup: Setup, name: str, configs: tuple[str, ...], tokens: int, options: dict[str, object], card: str | None = None
) -> None:
    """Trains for four steps on replayed samples: the first loads kernels, two are timed, and the last is profiled.

    Args:
        setup: Device and report.
        name: Name of the figures.
        configs: Names of configs.
        tokens: Tokens of the update, all in one micro-batch.
        options: Further options.
        card: Card whose memory the run has to fit.
    """
    policy, _ = model_folders(setup)
    replay = write_replay(setup, policy, 4, 8, setup.scale(96, 4), tokens // 8)
    figures: dict[str, Any] = {"step": 0, "seconds": math.inf}

    def after_step(trainer: Any, module: RLMTModule, outputs: dict[str, Any]) -> None:
        figures["step"] += 1
        if setup.on_gpu:
            if figures["step"] == 1:  # the budget has the update, and the first step loads kernels
                torch.cuda.reset_peak_memory_stats()
            figures["allocated"] = torch.cuda.max_memory_allocated()
            figures["reserved"] = torch.cuda.max_memory_reserved()
        if figures["step"] in (2, 3):
            figures["seconds"] = min(figures["seconds"], outputs["metrics"]["time/update_s"])
        if figures["step"] == 3:
            batch = outputs["experience"].rollouts
            figures["shape"] = (len(batch), len(batch.prompt_ids[0]), replay.completion)
            figures["trained"] = sum(p.numel() for p in module.trained_model.parameters() if p.requires_grad)
            memory = torch.cuda.get_device_properties(0).total_memory if setup.on_gpu else 80 * GIB
            figures["plan"] = make_budget(module, trainer.datamodule, torch.bfloat16, memory).total("update")
            figures["profile"] = profile(activities=[ProfilerActivity.CUDA if setup.on_gpu else ProfilerActivity.CPU])
            figures["profile"].start()
        elif figures["step"] == 4:
            figures["profile"].stop()

    AFTER_STEP[:] = [after_step]
    shared = {
        "--model.algorithm.kl_coef": 0,  # the reference's log-probs are no part of the update
        "--model.tokens_per_micro_batch": tokens,
        "--trainer.max_steps": 4,
    }
    try:
        fit(setup, "update", configs, replay.options | shared | options)
    except torch.OutOfMemoryError:
        setup.report.row(name, "out of memory", status="skipped")
        return
    report_update(setup, name, figures, card)


def report_update(setup: Setup, name: str, figures: dict[str, Any], card: str | None) -> None:
    """Reports tokens per second, the share of the peak, memory and kernels of an update."""
    rows, prompt, completion = figures["shape"]
    total, seconds = rows * (prompt + completion - 1), figures["seconds"]
    setup.report.row(f"{name}", total / seconds, "tokens/s")
    flops = update_flops(setup.config(), rows, prompt, completion, figures["trained"], lora=True)
    share = flops / seconds / setup.peak_flops()
    setup.report.goal(f"{name}, model flop/s of the peak", 100 * share, "%", "at least 40", share >= 0.4)
    plan = figures["plan"] - CUDA_CONTEXT
    setup.report.row(f"{name}, plan without context", plan / GIB, "GiB")
    if setup.on_gpu:
        gap = figures["allocated"] / plan - 1
        setup.report.row(f"{name}, peak allocated", figures["allocated"] / GIB, "GiB")
        setup.report.goal(f"{name}, peak against the plan", 100 * gap, "%", "within 10", abs(gap) <= 0.1)
        if card is not None:
            whole = figures["reserved"] + CUDA_CONTEXT
            setup.report.goal(f"{name}, memory with context", whole / 1e9, "GB", card, whole <= 24e9)
    events = figures["profile"].key_averages()
    time_of: Callable[[Any], float] = lambda e: e.self_device_time_total if setup.on_gpu else e.self_cpu_time_total  # noqa: E731
    whole = sum(map(time_of, events)) or 1.0
    for event in sorted(events, key=time_of, reverse=True)[:6]:
        setup.report.row(f"{name}, {event.key[:60]}", 100 * time_of(event) / whole, "% of device time")


def paged_optimizer(setup: Setup) -> None:
    """The paged 8-bit optimizer against the other one on less than 100 MB, and after its state was saved and loaded."""
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    def parameter() -> torch.nn.Parameter:
        values = torch.linspace(-1, 1, setup.scale(20_000_000, 20_000), device=setup.device)
        return torch.nn.Parameter(values)

    def steps(optimizer: Any, weight: Tensor, count: int) -> None:
        for number in range(count):
            weight.grad = torch.sin(weight.detach() * (number + 1))
            optimizer.step()

    plain, paged, resumed = (parameter() for _ in range(3))
    steps(AdamW8bit([plain], lr=1e-3), plain, 4)
    first = PagedAdamW8bit([paged], lr=1e-3)
    steps(first, paged, 4)
    setup.report.equal("paged optimizer against the other, 4 steps", float((plain - paged).detach().abs().max()), 1e-6)
    file = setup.folder / "optimizer.pt"
    torch.save(first.state_dict(), file)
    resumed.data.copy_(paged.data)
    second = PagedAdamW8bit([resumed], lr=1e-3)
    second.load_state_dict(torch.load(file, map_location=setup.device, weights_only=True))
    for optimizer, weight in ((first, paged), (second, resumed)):
        steps(optimizer, weight, 2)
    gap = float((paged - resumed).detach().abs().max())
    setup.report.equal("paged optimizer, saved and loaded, 2 more steps", gap, 1e-6)


# Part 6 ---------------------------------------------------------------------------------------------------------------


def forwards(setup: Setup) -> None:
    """Part 6: log-probs with and without shared prompts and packing, scores with and without a mask."""
    policy, reward = model_folders(setup)
    replay = write_replay(setup, policy, 2, 8, setup.scale(200, 8), setup.scale(1024, 64))
    AFTER_STEP[:] = [lambda trainer, module, outputs: compare_forwards(setup, module, outputs["experience"])]
    options: dict[str, object] = {
        **replay.options,
        "--model.reward.model": reward,
        "--model.reward.dtype": str(setup.dtype).removeprefix("torch."),
        "--model.tokens_per_micro_batch": setup.scale(8192, 512),
        "--model.gradient_checkpointing": "true",
        "--data.batch_size": 2,
        "--trainer.max_steps": 1,
        "--trainer.precision": "bf16-mixed" if setup.on_gpu else "32-true",
    }
    fit(setup, "forwards", ("base", "grpo", "llama-3.1-8b", "lora"), options)


# Part 9 ---------------------------------------------------------------------------------------------------------------


def sharded(setup: Setup) -> None:
    """Part 9: FSDP2 on one rank with all parameters trained, a step with offload, and a validation under DDP."""
    layers = setup.scale(8, 2)
    policy, _ = model_folders(setup, layers)
    tokens = setup.scale(8192, 256)
    replay = write_replay(setup, policy, 3, 8, setup.scale(96, 4), tokens // 8)
    options: dict[str, object] = {
        **replay.options,
        "--model.algorithm.kl_coef": 0,
        "--model.tokens_per_micro_batch": tokens,
        "--model.gradient_checkpointing": "true",
        "--trainer.devices": 1,
        "--trainer.precision": "bf16-mixed",
        **LENGTH_REWARD,
    }
    for name, steps, more in (("FSDP2", 2, {}), ("FSDP2 with offload", 1, {"--trainer.strategy.offload": "true"})):
        seconds: list[float] = []
        AFTER_STEP[:] = [lambda trainer, module, outputs, s=seconds: s.append(outputs["metrics"]["time/update_s"])]
        if setup.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        fit(setup, "sharded", ("base", "grpo", "fsdp"), options | more | {"--trainer.max_steps": steps})
        if not all(math.isfinite(s) for s in seconds) or len(seconds) != steps:
            raise RuntimeError(f"{name}: {len(seconds)} of {steps} steps were taken")
        setup.report.row(f"{name}, {layers} layers, all parameters", tokens / seconds[-1], "tokens/s")
        if setup.on_gpu:
            setup.report.row(f"{name}, peak", torch.cuda.max_memory_allocated() / GIB, "GiB")
    validate_reward_parts(setup)


def validate_reward_parts(setup: Setup) -> None:
    """Validates under DDP with a reward of several parts, whose logged values NCCL has to reduce."""
    tiny, began = tiny_folder(setup), time.perf_counter()
    options: dict[str, object] = {
        "--model.policy": tiny / "policy",
        "--model.reward": "WeightedSum",
        "--model.reward.rewards": '[{"class_path": "FormatReward"}, {"class_path": "LengthWindow", '
        '"init_args": {"min_chars": 1, "max_chars": 9, "margin": 50}}]',
        "--model.reward.weights": "[1.0, 0.5]",
        "--data.prompts": tiny / "prompts.jsonl",
        "--data.engine": "TransformersEngine",
        "--data.batch_size": 4,
        "--data.group_size": 2,
        "--data.max_new_tokens": 16,
        "--data.val_size": 8,
        "--trainer.strategy": "ddp",
        "--trainer.devices": 1,
        "--trainer.callbacks": "[]",
    }
    fit(setup, "validation", ("base", "grpo"), options, command="validate")
    setup.report.row("DDP validation with two reward parts", time.perf_counter() - began, "s")


# Part 12 --------------------------------------------------------------------------------------------------------------


def vllm_steps(setup: Setup) -> None:
    """Part 12: steps of GRPO whose samples vLLM generates in the trainer's process; times, memory and mismatch."""
    policy, _ = model_folders(setup)
    samples, tokens = setup.scale(64, 8), setup.scale(384, 16)
    options: dict[str, object] = {
        **LENGTH_REWARD,
        "--model.policy": policy,
        "--model.gradient_checkpointing": "true",
        "--data.prompts": tiny_folder(setup) / "prompts.jsonl",
        "--data.batch_size": samples // 8,
        "--data.group_size": 8,
        "--data.max_prompt_tokens": 256,
        "--data.max_new_tokens": tokens,
        "--data.engine": "VLLMEngine",
        "--trainer.max_steps": 3,
        "--trainer.precision": "bf16-mixed" if setup.on_gpu else "32-true",
    }
    steps: list[dict[str, float]] = []

    def after_step(trainer: Any, module: RLMTModule, outputs: dict[str, Any]) -> None:
        steps.append({name: float(value) for name, value in outputs["metrics"].items()})
        steps[-1]["tokens"] = float(outputs["experience"].lengths.sum())

    AFTER_STEP[:] = [after_step]
    began = time.perf_counter()
    with card_memory() as most:
        fit(setup, "vllm", ("base", "grpo", "lora"), options)
    name, last = f"GRPO with vLLM, LoRA, {samples} samples", steps[-1]
    setup.report.row(f"{name}, start and three steps", time.perf_counter() - began, "s")
    for part in ("sync", "rollout", "update", "step"):
        setup.report.row(f"{name}, {part}", last[f"time/{part}_s"], "s")
    setup.report.row(f"{name}, rollout", last["tokens"] / last["time/rollout_s"], "tokens/s")
    worst = max(row["engine/mismatch_kl"] for row in steps)
    limit = MEAN_GAP**2 / 2 if setup.on_gpu else 1e-6
    setup.report.equal(f"{name}, engine/mismatch_kl, worst of three", worst, limit, "nats")
    if setup.on_gpu:
        setup.report.row(f"{name}, most memory in use", most[0] / GIB, "GiB")
