"""LoRA adapters in vLLM: served from a temporary folder in PEFT's format, or merged into the weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from rlmt.engines.vllm.temporary_folders import TemporaryFolder
from rlmt.errors import UserError
from rlmt.models.adapters import merge_adapter
from rlmt.types import AdapterWeights

MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `max_lora_rank` in use here."""


class LoRASlot:
    """The only adapter slot of a running vLLM: holds the newest adapter, each under a new name and id.

    Args:
        engine: The `llm_engine` of a running `vllm.LLM` that was started with `lora_engine_args`.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._id = 0
        self.request: Any = None
        """The LoRARequest for `LLM.generate`; None before the first adapter."""

    def load(self, adapter: AdapterWeights) -> None:
        """Replaces the adapter.

        Raises:
            ValueError: vLLM cannot serve this adapter.
            RuntimeError: vLLM holds another adapter beside it.
        """
        from vllm.lora.request import LoRARequest

        for old in self._engine.list_loras():
            self._engine.remove_lora(old)
        self._id += 1
        with adapter_folder(adapter) as folder:
            self.request = LoRARequest(f"policy-{self._id}", self._id, folder)
            self._engine.add_lora(self.request)
        if self._engine.list_loras() != {self._id}:
            raise RuntimeError(f"vLLM holds the adapters {self._engine.list_loras()} instead of only {self._id}.")


@contextmanager
def adapter_folder(adapter: AdapterWeights) -> Iterator[str]:
    """Yields the path of a temporary folder with the adapter, in shared memory where the system has room for it."""
    size = sum(tensor.nbytes for tensor in adapter.tensors.values()) + 2**20  # with its config and the file's header
    with TemporaryFolder("adapter", memory_bytes=size) as folder:
        write_adapter(adapter, Path(folder))
        yield folder


def write_adapter(adapter: AdapterWeights, folder: Path) -> None:
    """Writes an adapter into a folder, in PEFT's format."""
    (folder / "adapter_config.json").write_text(json.dumps(adapter.config), encoding="utf-8")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def merge_adapters(weights: Iterable[tuple[str, Tensor]], adapter: AdapterWeights) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights with the adapter merged into them, one copied tensor at a time."""
    for name, tensor in weights:
        yield name, merge_adapter(name, tensor, adapter)


def lora_engine_args(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that reserve a slot for an adapter of this configuration.

    Every request has the adapter, so vLLM need not capture CUDA graphs for requests without one.
    """
    rank = next(rank for rank in MAX_LORA_RANKS if rank >= config["r"])
    graphs = {"cudagraph_specialize_lora": False}
    return {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "compilation_config": graphs}


def unsupported_reason(config: dict[str, Any]) -> str | None:
    """Reason why vLLM cannot serve an adapter, as far as its configuration shows, or None."""
    if config["use_dora"]:
        return "vLLM does not support DoRA"
    if config["r"] > MAX_LORA_RANKS[-1]:
        return f"vLLM supports ranks up to {MAX_LORA_RANKS[-1]}, but the adapter's rank is {config['r']}"
    if config["bias"] != "none" or config["modules_to_save"]:
        return "it trains more than low-rank matrices"
    return None


def adapter_error(reason: str) -> UserError:
    """The error for an adapter that vLLM cannot serve."""
    return UserError(f"VLLMEngine cannot serve this adapter: {reason}; use --data.engine.serve merged.")
