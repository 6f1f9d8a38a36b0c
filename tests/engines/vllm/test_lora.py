"""LoRA adapters in vLLM: log-probs equal the policy's after each sync, and the frozen base never changes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlmt.engines import VLLMEngine
from rlmt.engines.vllm import engine as engine_module
from rlmt.engines.vllm.lora import MAX_LORA_RANKS, adapter_folder, lora_engine_args
from rlmt.errors import UserError
from rlmt.models import NF4, LoRA, loading
from rlmt.models.adapters import adapter_weights, base_tensors, trainable_parameters
from rlmt.models.quantization import dequantize
from rlmt.types import AdapterWeights, SampleRequest, Sampling

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


class World:
    """A policy with an adapter, and a running engine that serves it."""

    def __init__(self, policy: PreTrainedModel, helpers: Any, **options: Any) -> None:
        self.policy, self.helpers, self.version, self.base_reads = policy.train(), helpers, 0, 0
        self.engine = VLLMEngine(cpu_kv_cache_gib=0.1, max_num_seqs=64, **options)
        self.engine.start(policy, helpers.tokenizer(), helpers.max_len, policy.dtype)
        self.optimizer = torch.optim.AdamW(trainable_parameters(policy), lr=0.02)

    def base(self) -> Iterator[tuple[str, Tensor]]:
        self.base_reads += 1
        for name, tensor in base_tensors(self.policy).items():
            yield name, dequantize(tensor)

    def train(self) -> None:
        ids = torch.randint(0, 300, (1, 40))
        self.policy(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def sync(self) -> None:
        self.version += 1
        self.engine.sync(self.base(), self.version, adapter_weights(self.policy))

    def mismatch(self, requests: list[SampleRequest]) -> float:
        samples = self.engine.generate(requests, Sampling(0.7, 24))
        assert samples.weight_version == self.version
        return self.helpers.mismatch(self.policy, requests, samples, 0.7)  # type: ignore[no-any-return]

    def bits(self) -> dict[str, Tensor]:
        """Copies of the frozen base's tensors, including the statistics of 4-bit weights."""
        state = self.policy.state_dict()
        return {name: tensor.clone() for name, tensor in state.items() if ".lora_" not in name}


@pytest.fixture
def memory_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces /dev/shm, where other processes may have temporary folders."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr("rlmt.engines.vllm.temporary_folders._MEMORY", folder)
    return folder


def load(helpers: Any, architecture: str, tmp_path: Path, quantization: NF4 | None) -> PreTrainedModel:
    helpers.policy(architecture).save_pretrained(tmp_path)
    return loading.load_policy(tmp_path, "float32", quantization=quantization)


@needs_vllm
@pytest.mark.parametrize(
    ("architecture", "quantization", "options", "syncs"),
    [
        ("llama-tied", None, {"rank": 12, "alpha": 12, "rslora": True}, 20),
        pytest.param("llama-tied", None, {"rank": 12, "alpha": 12, "rslora": True}, 100, marks=pytest.mark.slow),
        pytest.param(
            *("qwen2-untied", NF4(), {"rank": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}, 100),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["LoRA", "LoRA, 100 syncs", "QLoRA, 100 syncs"],
)
def test_base_is_unchanged_and_logprobs_exact_over_many_syncs(
    architecture: str,
    quantization: NF4 | None,
    options: dict[str, Any],
    syncs: int,
    helpers: Any,
    tmp_path: Path,
    memory_folder: Path,
) -> None:
    policy = load(helpers, architecture, tmp_path, quantization)
    LoRA(**options).add_to(policy)
    world = World(policy, helpers)
    try:
        bits = world.bits()
        requests = [SampleRequest(prompt, [i, i + 9]) for i, prompt in enumerate(helpers.prompts(4, 70))]
        for step in range(syncs):
            world.sync()
            if step % 20 == 0 or step == syncs - 1:
                assert world.mismatch(requests) < 1e-3
            if step == 0:
                world.train()
                assert world.mismatch(requests) > 1e-2  # the engine's cached prefixes are stale from here on
                continue
            world.train()
        assert world.base_reads == 1
        assert not list(memory_folder.iterdir())
        after = world.bits()
        assert after.keys() == bits.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in bits.items())
    finally:
        world.engine.close()


@pytest.mark.slow
@needs_vllm
def test_merged_weights_serve_dora_on_a_quantized_base(helpers: Any, tmp_path: Path) -> None:
    policy = load(helpers, "qwen2-tied", tmp_path, NF4())
    LoRA(rank=4, dora=True).add_to(policy)
    with pytest.raises(UserError, match=r"DoRA; use --data.engine.serve merged"):
        World(policy, helpers)
    world = World(policy, helpers, serve="merged")
    try:
        bits = world.bits()
        requests = [SampleRequest(prompt, [i]) for i, prompt in enumerate(helpers.prompts(4, 70))]
        for _ in range(3):
            world.train()
            world.sync()
            assert world.mismatch(requests) < 1e-3
        assert world.base_reads == 3
        assert all(torch.equal(world.bits()[name], tensor) for name, tensor in bits.items())
        with pytest.raises(RuntimeError, match="vLLM did not load all weights"):
            world.engine.sync(iter(()), 9, adapter_weights(policy))
    finally:
        world.engine.close()


@pytest.mark.slow
@needs_vllm
def test_quantized_engine_approximates_the_policy(helpers: Any) -> None:
    """The base is quantized, which costs a measured mismatch; the adapter is not.

    As under bf16-mixed the base is bfloat16 and the adapter float32, whose casts are autocast's.
    """
    policy = helpers.policy("llama-untied").bfloat16()
    for p in policy.parameters():
        p.data /= 4  # weights of a usual scale, so that the rounding error has a usual scale
    LoRA(rank=8).add_to(policy)
    world = World(policy, helpers, quantization="fp8_per_channel")
    try:
        requests = [SampleRequest(prompt, [i, i + 9]) for i, prompt in enumerate(helpers.prompts(4, 70))]
        mismatches = []
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # the adapter changes inside
            for _ in range(3):
                world.sync()
                mismatches.append(world.mismatch(requests))
                world.train()
            assert world.mismatch(requests) > 4 * max(mismatches)  # stale: the adapter changes more
        assert world.base_reads == 1 and all(1e-3 < value < 0.5 for value in mismatches), mismatches
    finally:
        world.engine.close()


@pytest.mark.slow
@needs_vllm
def test_adapter_of_unknown_layers_raises_at_start(
    helpers: Any, memory_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM itself checks the adapter's layer names."""
    policy = helpers.policy("llama-tied")
    LoRA(rank=2, target_modules=["q_proj"]).add_to(policy)
    complete = adapter_weights(policy)
    assert complete is not None
    renamed = {name.replace("q_proj", "query"): tensor for name, tensor in complete.tensors.items()}
    monkeypatch.setattr(engine_module, "adapter_weights", lambda policy: AdapterWeights(complete.config, renamed))
    engine = VLLMEngine(cpu_kv_cache_gib=0.1, max_num_seqs=8)
    with pytest.raises(
        UserError, match=r"cannot serve this adapter: .*query.*; use --data.engine.serve merged"
    ) as caught:
        engine.start(policy, helpers.tokenizer(), helpers.max_len, torch.float32)
    assert "\n" not in str(caught.value)
    assert engine._llm is None and not list(memory_folder.iterdir())


def test_unsupported_adapters_raise_with_the_fix(helpers: Any) -> None:
    policy = helpers.policy("llama-tied")
    good = LoRA(rank=512).config(policy)
    VLLMEngine().check_adapter(good)
    bad = [LoRA(dora=True).config(policy), LoRA(rank=513).config(policy), good | {"modules_to_save": ["lm_head"]}]
    for config, reason in zip(
        bad, ("DoRA", "ranks up to 512, but the adapter's rank is 513", "more than low-rank"), strict=True
    ):
        with pytest.raises(UserError, match=f"{reason}.*; use --data.engine.serve merged"):
            VLLMEngine().check_adapter(config)
        VLLMEngine(serve="merged").check_adapter(config)


@needs_vllm
def test_max_lora_rank_is_the_next_larger_that_vllm_supports(helpers: Any) -> None:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    assert set(MAX_LORA_RANKS) <= set(get_args(MaxLoRARanks))
    for rank, expected in ((1, 8), (8, 8), (9, 16), (300, 320), (512, 512)):
        assert lora_engine_args({"r": rank})["max_lora_rank"] == expected


def test_adapter_folder_loads_in_peft_and_is_temporary(helpers: Any) -> None:
    from peft import PeftModel

    policy = helpers.policy("llama-untied").eval()
    LoRA(rank=3, alpha=5, dora=True).add_to(policy)
    for p in trainable_parameters(policy):
        p.data += 0.05 * torch.randn(p.shape)
    adapter = adapter_weights(policy)
    assert adapter is not None
    with adapter_folder(adapter) as folder:
        files = {file.name for file in Path(folder).iterdir() if not file.name.startswith(".")}
        assert files == {"adapter_config.json", "adapter_model.safetensors"}
        loaded: Any = PeftModel.from_pretrained(helpers.policy("llama-untied").eval(), folder)
    assert not Path(folder).exists()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, policy(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="boom"), adapter_folder(adapter) as folder:
        raise RuntimeError("boom")
    assert not Path(folder).exists()


@needs_vllm
def test_base_is_reloaded_after_sleep_mode(helpers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces vllm.LLM, since sleep mode needs a GPU."""
    calls: list[str] = []

    class Recorder:
        def __init__(self) -> None:
            self.llm_engine, self.loras = self, set[int]()

        def collective_rpc(self, name: str, kwargs: dict[str, Any]) -> None:
            calls.append(f"{name} {len(list(kwargs['weights_iterator']))}")
            self.loras.clear()  # as vLLM does

        def list_loras(self) -> set[int]:
            return set(self.loras)

        def add_lora(self, request: Any) -> None:
            assert Path(request.lora_path, "adapter_model.safetensors").is_file()
            self.loras.add(request.lora_int_id)
            calls.append(f"add {request.lora_int_id}")

        def remove_lora(self, number: int) -> None:
            self.loras.remove(number)
            calls.append(f"remove {number}")

        def wake_up(self, tags: list[str]) -> None:
            calls.append(f"wake {tags[0]}")

        def sleep(self, level: int) -> None:
            calls.append(f"sleep {level}")

        def reset_prefix_cache(self) -> bool:
            return True

        def generate(self, *args: Any, lora_request: Any = None, **kwargs: Any) -> list[Any]:
            calls.append(f"generate with {lora_request and lora_request.lora_int_id}")
            return []

        def apply_model(self, function: Any) -> list[bool]:
            return [True]

    policy = helpers.policy("llama-tied")
    LoRA(rank=2).add_to(policy)
    engine = VLLMEngine()
    monkeypatch.setattr(engine, "_launch", lambda *args: Recorder())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    engine.start(policy, helpers.tokenizer(), helpers.max_len, torch.float32)
    assert calls == ["add 1"]
    calls.clear()
    count = len(base_tensors(policy))
    engine._eager = engine._sleeps = True
    for version in (1, 2):
        engine.sync(base_tensors(policy).items(), version, adapter_weights(policy))
        engine.generate([SampleRequest([1], [])], Sampling(1.0, 1))
        assert engine.version is None
    first = [f"reload_weights {count}", "generate with None", "add 2", "generate with 2", "sleep 2"]
    again = ["wake weights", f"reload_weights {count}", "wake kv_cache", "add 3", "generate with 3", "sleep 2"]
    assert calls == first + again
    engine._llm = None
    engine.close()
