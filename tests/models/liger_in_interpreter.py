"""Liger's own kernels against transformers' layers, on a CPU in Triton's interpreter; test_liger.py runs this file.

The interpreter has no functions of CUDA's libdevice, and leaves floats as Python's, which a GPU receives as float32.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from liger_kernel.ops import geglu, rms_norm
from liger_kernel.transformers import functional
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForSequenceClassification
from triton.runtime import interpreter

from rlmt.distributed.fsdp2 import call_as_forward, full_tensor, shard_model
from rlmt.models import NF4, LoRA, liger, loading
from rlmt.models.activation_checkpointing import Checkpointing
from rlmt.models.critic import build_critic
from rlmt.models.logprobs import token_logprobs
from rlmt.models.micro_batch import MicroBatch
from rlmt.models.reward_model import last_token_states, score_states
from rlmt.models.training_mode import set_training_mode

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from families import family_model  # noqa: E402

plain_argument = interpreter._implicit_cvt
CPU = torch.device("cpu")


@triton.jit
def rsqrt(x):  # type: ignore[no-untyped-def]
    return 1 / tl.sqrt(x)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * x) - 1


def argument(value: Any) -> Any:
    if isinstance(value, float):
        handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
        return tl.core.tensor(handle, tl.float32)
    return plain_argument(value)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels run on the CPU; each call appends the kernel's name."""
    made: list[str] = []
    monkeypatch.setattr(interpreter, "_implicit_cvt", argument)
    monkeypatch.setattr(rms_norm, "rsqrt", rsqrt)
    monkeypatch.setattr(geglu, "tanh", tanh)
    monkeypatch.setattr(liger, "_on_gpu", lambda tensor: True)
    for name in ("liger_rms_norm", "liger_swiglu", "liger_geglu"):
        kernel = getattr(functional, name)

        def counted(*args: Any, kernel: Any = kernel, name: str = name, **options: Any) -> Tensor:
            made.append(name)
            output: Tensor = kernel(*args, **options)
            return output

        monkeypatch.setattr(functional, name, counted)
    return made


def batch(vocabulary: int) -> MicroBatch:
    """Two rows of 7 and 5 tokens, padded on the right; all but the first token of a row are targets."""
    make = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (2, 8), generator=make)
    rows = torch.tensor([0] * 7 + [1] * 5)
    columns = torch.cat([torch.arange(7), torch.arange(5)])
    return MicroBatch([0, 1], None, ids[:, :-1], rows, columns, ids[rows, columns + 1])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def update(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and gradients."""
    outputs = call_as_forward(model, _logprobs)
    (outputs[0] * torch.linspace(-1, 1, len(outputs[0])) + outputs[1]).sum().backward()
    return outputs[0].detach(), gradients(model)


def _logprobs(model: Any) -> tuple[Tensor, Tensor]:
    outputs = token_logprobs(model, batch(model.config.get_text_config().vocab_size), 0.7)
    return outputs.logprobs.clone(), outputs.entropy.clone()


def adapter(model: Any) -> Any:
    """Adds an adapter with random weights to all linear layers."""
    torch.manual_seed(1)
    LoRA(rank=4).add_to(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys() != set()
    scale = max(float(g.abs().max()) for g in theirs[1].values())
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize(
    ("name", "mode"), [("Llama", False), ("Llama", "selective"), ("Qwen2", "selective"), ("Gemma 2", True)]
)
def test_update_of_all_parameters(name: str, mode: Checkpointing, calls: list[str]) -> None:
    found = []
    for kernels in (False, True):
        model = family_model(name)
        set_training_mode(model, mode, dropout=False)
        layers = liger.bind_kernels(model) if kernels else 0
        found.append(update(model))
    assert_same(found[1], found[0])
    assert len(calls) >= layers > 0


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Gemma", "Phi-3", "Granite", "Qwen3-MoE"])
def test_update_of_an_adapter(name: str, calls: list[str]) -> None:
    found = []
    for kernels in (False, True):
        model = adapter(family_model(name))
        set_training_mode(model, True, dropout=False)
        if kernels:
            liger.bind_kernels(model)
        found.append(update(model))
    assert_same(found[1], found[0])
    assert calls and all(".lora_" in parameter for parameter in found[1][1])


def test_update_of_an_adapter_on_4_bits(tmp_path: Path, calls: list[str]) -> None:
    family_model("Llama").save_pretrained(tmp_path)
    found = []
    for kernels in (False, True):
        model = adapter(loading.load_policy(tmp_path, "float32", quantization=NF4()))
        set_training_mode(model, True, dropout=False)
        if kernels:
            liger.bind_kernels(model)
        found.append(update(model))
    assert_same(found[1], found[0])
    assert {"liger_rms_norm", "liger_swiglu"} == set(calls)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma 2"])
def test_mixed_precision(name: str, lora: bool, calls: list[str]) -> None:
    """The same dtypes, and a difference of rounding. In float16, since the interpreter gets bfloat16 wrong."""
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for kernels in (False, True):
        model = adapter(family_model(name).half()) if lora else family_model(name)
        if kernels:
            liger.bind_kernels(model)
        with torch.autocast("cpu", torch.float16):
            hidden = model.get_decoder()(batch(336).input_ids, use_cache=False).last_hidden_state
        with torch.autocast("cpu", enabled=False):
            hidden.float().square().mean().backward()
        found.append((hidden.detach(), gradients(model)))
    (theirs, expected), (ours, got) = found
    assert ours.dtype == theirs.dtype and calls
    assert float((ours - theirs).float().norm() / theirs.float().norm()) < 0.01
    norm = sum(float(g.double().square().sum()) for g in expected.values()) ** 0.5
    assert sum(float((got[n] - expected[n]).double().square().sum()) for n in expected) ** 0.5 / norm < 0.03


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("lora", [False, True])
def test_sharded_model(lora: bool, mesh: Any, calls: list[str]) -> None:
    found = []
    for kernels in (False, True):
        model = adapter(family_model("Llama")) if lora else family_model("Llama")
        set_training_mode(model, True, dropout=False)
        if kernels:
            liger.bind_kernels(model)
        shard_model(model, mesh, mixed=False)
        found.append(update(model))
    assert_same(found[1], found[0])
    assert {"liger_rms_norm", "liger_swiglu"} == set(calls)


def test_reward_model_and_critic(calls: list[str]) -> None:
    rows = [torch.arange(3, 9), torch.arange(20, 24)]
    model: Any = family_model("Gemma 2", AutoModelForSequenceClassification, num_labels=1)
    policy = family_model("Llama")
    critic = build_critic(policy)
    nn.init.normal_(critic.head.weight)
    found = []
    for kernels in (False, True):
        if kernels:
            liger.bind_kernels(model)
            liger.bind_kernels(critic)
        with torch.no_grad():
            scores = score_states(model, last_token_states(model.model, rows, CPU))
            found.append(torch.cat([scores, critic(batch(336))]))
        assert bool(calls) == kernels
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_generation_with_a_cache(calls: list[str]) -> None:
    policy: Any = family_model("Qwen2")
    ids, found = torch.arange(3, 11)[None], []
    for kernels in (False, True):
        if kernels:
            liger.bind_kernels(policy)
        found.append(policy.generate(ids, max_new_tokens=12, do_sample=False))
    assert torch.equal(*found) and calls
