"""Arguments of `vllm.LLM` for an engine in the trainer's process, and the model folder that vLLM reads."""

from __future__ import annotations

import copy
from typing import Any

from rlmt.annotations import PreTrainedModel, PreTrainedTokenizerBase
from rlmt.distributed import collectives

_CPU_BLOCK_SIZE = 32
"""Tokens per block of the KV cache on CPU: the smallest size that vLLM's CPU attention supports. Samples of a prompt
share only full blocks, and most chat prompts are shorter than one block of vLLM's default, 128."""


def device_args(engine: Any, on_cpu: bool, max_model_len: int) -> dict[str, Any]:
    """Arguments for the memory and the ranks of one device.

    Args:
        engine: The `VLLMEngine`, for its options.
        on_cpu: Whether vLLM runs on a CPU.
        max_model_len: Longest prompt + completion in tokens.
    """
    args: dict[str, Any] = {
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "max_num_batched_tokens": max(engine.max_num_batched_tokens, engine.max_num_seqs),
    }
    if on_cpu:
        args = cpu_args(engine.cpu_kv_cache_gib, max_model_len, engine.max_num_seqs, engine.chunks_prefill)
    if collectives.world_size() > 1:  # each rank starts its own worker in the existing process group
        args["distributed_executor_backend"] = "external_launcher"
        args["tensor_parallel_size"] = engine.tensor_parallel_size
    return args


def cpu_args(
    kv_cache_gib: float, max_model_len: int, max_num_seqs: int, chunks_prefill: bool = False
) -> dict[str, Any]:
    """Arguments for vLLM's CPU build.

    It crashes where chunked prefill rewinds a seeded generator, so every prompt must fit into one step.

    Args:
        kv_cache_gib: Size of the KV cache in GiB.
        max_model_len: Longest prompt + completion in tokens.
        max_num_seqs: Maximum number of samples decoded at once.
        chunks_prefill: Whether chunked prefill is enabled, which models with linear attention require.
    """
    return {
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
        "block_size": _CPU_BLOCK_SIZE,
        "enable_chunked_prefill": chunks_prefill,
        "max_num_batched_tokens": max(max_model_len, max_num_seqs, 4096),
    }


def save_config(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Writes the policy's config and tokenizer, but no weights, for vLLM to read."""
    config = copy.deepcopy(policy.config)
    config.architectures = config.architectures or [type(policy).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def one_line(error: Exception) -> str:
    """The message of an error of vLLM as one line of at most 400 characters."""
    return " ".join(str(error).split())[:400].rstrip(".")
