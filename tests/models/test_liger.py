"""Layers that have a kernel are computed by it on a GPU, and by transformers elsewhere; parameters stay as they are."""

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from rlmt.errors import UserError
from rlmt.models import LoRA, liger, loading
from rlmt.models.liger import bind_kernels, check_kernels, uses_kernels

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
SIZES: dict[str, Any] = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
GATED = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
IDS = torch.arange(2 * 7).view(2, 7)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "_installed", lambda: True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every tensor counts as one on a GPU, and these stand for Liger's functions; what each call was given."""
    made: list[Any] = []

    def norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting_mode: str, in_place: bool) -> Tensor:
        made.append((eps, offset, casting_mode, in_place))
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (offset + weight)

    def gated(name: str, activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda gate, up: (made.append(name), activation(gate) * up)[1]

    functional: Any = ModuleType("functional")
    functional.liger_rms_norm = norm
    functional.liger_swiglu = gated("swiglu", F.silu)
    functional.liger_geglu = gated("geglu", lambda gate: F.gelu(gate, approximate="tanh"))
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    monkeypatch.setattr(liger, "_on_gpu", lambda tensor: True)
    return made


def family(model_type: str, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """A model with random weights, norms included, in float32."""
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(model_type, **GATED | options), attn_implementation="eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_kernels_are_bound_to_layers_that_compute_the_same() -> None:
    meta = loading.meta_model
    assert bind_kernels(meta(LlamaConfig(**SIZES))) == 2 * (2 + 1) + 1
    assert bind_kernels(meta(AutoConfig.for_model("qwen3", **GATED))) == 2 * (4 + 1) + 1, "query and key norms"
    assert bind_kernels(meta(AutoConfig.for_model("gemma2", **GATED))) == 2 * (4 + 1) + 1
    assert bind_kernels(meta(AutoConfig.for_model("phi3", **GATED))) == 2 * 2 + 1, "its MLP has one projection for both"
    assert bind_kernels(meta(LlamaConfig(**SIZES, hidden_act="gelu"))) == 2 * 2 + 1, "no kernel has this activation"
    assert bind_kernels(meta(AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4))) == 0


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2"])
def test_adapters_get_the_gradient_of_the_eager_layers(model_type: str, calls: list[Any]) -> None:
    found = []
    for kernels in (False, True):
        model = family(model_type, rms_norm_eps=1e-3)
        torch.manual_seed(1)
        LoRA(rank=4).add_to(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        layers = bind_kernels(model) if kernels else 0
        logits = model(IDS, use_cache=False).logits
        logits.log_softmax(-1)[..., 0].sum().backward()
        found.append((logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert len(calls) == layers and any(".mlp.gate_proj.lora_A." in name for name in found[1][1])
    gemma = model_type == "gemma2"
    norm = (1e-3, 1.0, "gemma", False) if gemma else (1e-3, 0.0, "llama", False)
    assert set(calls) == {norm, "geglu" if gemma else "swiglu"}


def test_norm_that_returns_another_dtype_is_left_to_transformers(calls: list[Any]) -> None:
    policy: Any = family("llama")
    bind_kernels(policy)
    norm = policy.model.norm
    assert norm(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.float32 and not calls
    assert norm.bfloat16()(torch.ones(1, 32)).dtype == torch.float32 and len(calls) == 1


def test_cpu_parameters_copies_and_other_models_stay_as_they_are() -> None:
    plain, policy = family("llama"), family("llama")
    bind_kernels(policy)
    copied = copy.deepcopy(policy)
    assert copied.model.norm.forward.__self__ is copied.model.norm
    assert policy.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        for model in (policy, copied):
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert all("forward" not in vars(layer) for layer in LlamaForCausalLM(LlamaConfig(**SIZES)).modules())


def test_reward_model_has_kernels() -> None:
    model = family("gemma2", AutoModelForSequenceClassification, num_labels=1)
    assert bind_kernels(nn.ModuleList([model])) == 2 * (4 + 1) + 1


def test_default_is_a_gpu_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert uses_kernels(None, GPU) and not uses_kernels(None, CPU) and not uses_kernels(False, GPU)
    monkeypatch.setattr(liger, "_installed", lambda: False)
    assert not uses_kernels(None, GPU)


def test_kernels_that_cannot_be_used_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(device: torch.device, **config: Any) -> None:
        check_kernels(device, lambda: loading.meta_model(AutoConfig.for_model(**config)))

    check(GPU, model_type="llama", **SIZES)
    with pytest.raises(UserError, match=r"^--model\.liger_kernels is true, but no layer of GPT2LMHeadModel .* out\.$"):
        check(GPU, model_type="gpt2", n_layer=1)
    with pytest.raises(UserError, match=r"^--model\.liger_kernels is true, but the run has no GPU.*out\.$"):
        check(CPU, model_type="llama", **SIZES)
    monkeypatch.setattr(liger, "_installed", lambda: False)
    with pytest.raises(UserError, match=r"^--model\.liger_kernels is true, but .*pip install liger-kernel.*out\.$"):
        check(GPU, model_type="llama", **SIZES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_kernels_compute_what_transformers_computes() -> None:
    script = Path(__file__).with_name("liger_in_interpreter.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", script]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
