"""Part 1 of benchmarks/gpu.py: versions, and what the device can do at best."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from gpu_models import GIB, Setup, data_sheet_flops

PACKAGES = ("torch", "transformers", "lightning", "peft", "bitsandbytes", "liger-kernel", "flash-attn", "vllm")


def ceilings(setup: Setup) -> None:
    """Part 1: versions, and what the device can do at best."""
    setup.report.row("Python", platform.python_version())
    for name in PACKAGES:
        try:
            setup.report.row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            setup.report.row(name, "not installed")
    if setup.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        setup.report.row("card", properties.name)
        setup.report.row("memory", properties.total_memory / GIB, "GiB")
        setup.report.row("CUDA", str(torch.version.cuda))
    flops, listed = setup.matmul_flops(setup.scale(8192, 512)), data_sheet_flops(setup)
    setup.report.row("matrix product", flops / 1e12, "Tflop/s", f"{listed / 1e12:.3g} by its maker" if listed else "")
    source = torch.zeros(setup.scale(GIB, GIB // 64), dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    seconds = setup.seconds(lambda: target.copy_(source))
    setup.report.row("copy, bytes read and written", 2 * source.numel() / seconds / GIB, "GiB/s")
