"""4-bit layers compute with the weights that `dequantize` returns, and nothing rewrites these."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from rlmt.errors import UserError
from rlmt.models import NF4, LoRA, loading
from rlmt.models.adapters import adapter_weights, base_tensors, merge_adapter
from rlmt.models.quantization import dequantize, unquantized_shape
from rlmt.models.training_mode import eval_mode

pytest.importorskip("bitsandbytes")
IDS = torch.arange(2 * 11).view(2, 11) % 61


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def nf4(folder: Path, double_quant: bool = True, **options: Any) -> Any:
    return loading.load_policy(folder, "float32", quantization=NF4(double_quant), **options)


def in_full(quantized: Any, folder: Path) -> Any:
    """A model with the same function and float32 weights."""
    plain = loading.load_policy(folder, "float32")
    plain.load_state_dict({name: dequantize(tensor) for name, tensor in base_tensors(quantized).items()})
    return plain


@pytest.mark.parametrize("double_quant", [True, False])
def test_only_linear_layers_are_quantized(double_quant: bool, folder: Path) -> None:
    plain, quantized = loading.load_policy(folder, "float32"), nf4(folder, double_quant)
    tensors = base_tensors(quantized)
    assert tensors.keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        found = dequantize(tensors[name])
        assert found.dtype == torch.float32 and found.shape == tensor.shape
        if "_proj" in name:
            assert tensors[name].numel() == tensor.numel() / 2 and tensors[name].dtype == torch.uint8
            error = (found - tensor).norm() / tensor.norm()
            assert 0.05 < error < 0.12  # NF4 of normal weights: 0.09
            assert len(found.flatten()[:64].unique()) <= 16  # a block of 64 weights has one scale
        else:
            assert torch.equal(found, tensor)
    assert not hasattr(quantized.config, "quantization_config")
    assert "quantization" not in json.dumps(quantized.config.to_dict())


def test_quantized_layer_computes_with_the_dequantized_weight_in_every_mode(folder: Path) -> None:
    """On CPUs with bfloat16, bitsandbytes would rewrite weights in eval mode and compute less exactly afterwards."""
    policy = nf4(folder)
    layer: Any = policy.model.layers[0].mlp.up_proj
    bits = layer.weight.data.clone()
    full = dequantize(layer.weight)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        layer.train(training)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), F.linear(x, full), rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.weight.data, bits)


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_equal_those_of_the_dequantized_model(dora: bool, folder: Path) -> None:
    quantized = nf4(folder)
    plain = in_full(quantized, folder)
    gradients = []
    for policy in (quantized, plain):
        torch.manual_seed(1)
        LoRA(rank=4, dora=dora).add_to(policy)
        make = torch.Generator().manual_seed(2)
        for p in policy.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn(p.shape, generator=make)
        policy.train()
        with eval_mode(policy), torch.no_grad():
            policy(input_ids=IDS)  # like an engine that samples from the policy itself
        policy(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)
    adapter = adapter_weights(quantized)
    assert adapter is not None
    name = "model.layers.0.self_attn.q_proj.weight"
    layer: Any = plain.model.layers[0].self_attn.q_proj
    whole = merge_adapter(name, dequantize(base_tensors(quantized)[name]), adapter)
    torch.testing.assert_close(layer(torch.eye(64)).T, whole, rtol=1e-4, atol=1e-5)


def test_quantized_bfloat16_layers_compute_in_bfloat16(folder: Path) -> None:
    policy = loading.load_policy(folder, "bfloat16", quantization=NF4())
    LoRA(rank=2).add_to(policy)
    layer: Any = policy.model.layers[0].mlp.up_proj
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    full = dequantize(layer.base_layer.weight)
    assert full.dtype == torch.bfloat16
    assert unquantized_shape(layer.base_layer.weight) == full.shape != layer.base_layer.weight.shape
    assert unquantized_shape(full) == full.shape
    assert torch.equal(layer.base_layer(x), F.linear(x, full))
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}


def test_models_that_cannot_be_quantized_raise(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}})
    )
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="weights are quantized"):
        loading.load_policy(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        NF4().check()
