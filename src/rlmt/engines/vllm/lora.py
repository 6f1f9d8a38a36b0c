"""How an adapter reaches vLLM: a folder of PEFT's format in memory, gone as soon as vLLM has read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from rlmt.engines.vllm.temporary_folders import TemporaryFolder
from rlmt.types import AdapterWeights

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for."""


class LoRASlot:
    """vLLM's one place for an adapter: holds the newest and no other, each under a name and a number of its own.

    Args:
        engine: a running vLLM's `llm_engine`, started with `launch_options`.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._number = 0
        self.request: Any = None
        """What `LLM.generate` takes to sample with the adapter."""

    def put(self, adapter: AdapterWeights) -> None:
        """Replaces the adapter.

        Raises:
            ValueError: vLLM cannot serve such a one.
        """
        from vllm.lora.request import LoRARequest

        for old in self._engine.list_loras():
            self._engine.remove_lora(old)
        self._number += 1
        with adapter_folder(adapter) as folder:
            self.request = LoRARequest(f"policy-{self._number}", self._number, folder)
            self._engine.add_lora(self.request)
        if self._engine.list_loras() != {self._number}:
            raise RuntimeError(f"vLLM holds the adapters {self._engine.list_loras()}, not {self._number} alone")


@contextmanager
def adapter_folder(adapter: AdapterWeights) -> Iterator[str]:
    """Path of a folder that holds the adapter, in memory where the system has such a place; removed at the end."""
    with TemporaryFolder("adapter", in_memory=True) as folder:
        write_adapter(adapter, Path(folder))
        yield folder


def write_adapter(adapter: AdapterWeights, folder: Path) -> None:
    """Writes an adapter into a folder, in PEFT's format."""
    (folder / "adapter_config.json").write_text(json.dumps(adapter.config), encoding="utf-8")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def launch_options(config: dict[str, Any]) -> dict[str, Any]:
    """What `vllm.LLM` takes to make room for an adapter of this configuration."""
    rank = next(rank for rank in RANKS if rank >= config["r"])
    return {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}


def unsupported_reason(config: dict[str, Any]) -> str | None:
    """Why vLLM cannot serve an adapter of this configuration, as far as that tells, or None."""
    if config["use_dora"]:
        return "vLLM does not know DoRA"
    if config["r"] > RANKS[-1]:
        return f"vLLM takes ranks up to {RANKS[-1]}, and this one is {config['r']}"
    if config["bias"] != "none" or config["modules_to_save"]:
        return "it changes more than low-rank matrices"
    return None
