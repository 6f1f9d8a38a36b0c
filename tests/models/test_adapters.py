"""Adapters equal PEFT's own model and the formulas of the papers."""

import copy
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen2Config,
)
from transformers import Qwen2ForCausalLM as Qwen2

from rlmt.errors import UserError
from rlmt.models import LoRA
from rlmt.models.adapters import (
    CRITIC,
    POLICY,
    adapter_weights,
    base_tensors,
    check_same_adapter,
    merge_adapter,
    trainable_parameters,
    use_adapter,
)

LAYERS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
IDS = torch.arange(2 * 11).view(2, 11) % 61


def model(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()


def scrambled(policy: PreTrainedModel, adapter: str = POLICY) -> PreTrainedModel:
    """Sets the adapter's weights as if it had been trained."""
    make = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if f".{adapter}." in name:
                p += 0.1 * torch.randn(p.shape, generator=make)
    return policy


@torch.no_grad()
def logits(policy: nn.Module) -> Tensor:
    return policy(input_ids=IDS).logits.float()  # type: ignore[no-any-return]


OPTIONS = {
    "lora": {"rank": 4, "alpha": 6},
    "rslora": {"rank": 4, "alpha": 6, "rslora": True},
    "dora": {"rank": 4, "alpha": 6, "dora": True},
    "two layers": {"rank": 3, "alpha": 7, "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_lora_model_equals_peft_model(options: dict[str, Any]) -> None:
    """The same trainable parameters, the same function, and the same weights after PEFT merges a copy."""
    ours = model()
    LoRA(**options).add_to(ours)
    scrambled(ours)
    config = LoraConfig(
        r=options["rank"],
        lora_alpha=options["alpha"],
        use_rslora=options.get("rslora", False),
        use_dora=options.get("dora", False),
        target_modules=options.get("target_modules", "all-linear"),
    )
    theirs: Any = get_peft_model(copy.deepcopy(model()), config)
    trained = {f"base_model.model.{name}": p for name, p in ours.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name, p in theirs.named_parameters() if p.requires_grad}
    theirs.load_state_dict(trained, strict=False)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)

    adapter = adapter_weights(ours)
    assert adapter is not None
    whole = theirs.merge_and_unload().state_dict()
    base = {name: tensor.detach().clone() for name, tensor in base_tensors(ours).items()}
    assert whole.keys() == base.keys() == model().state_dict().keys()
    for name, tensor in base.items():
        torch.testing.assert_close(merge_adapter(name, tensor, adapter), whole[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(tensor, model().state_dict()[name])  # merge_adapter works on a copy


def test_merged_weight_equals_the_formulas_of_the_papers() -> None:
    policy = model()
    LoRA(rank=4, alpha=6, dora=True, rslora=True).add_to(policy)
    scrambled(policy)
    layer: Any = policy.model.layers[1].mlp.up_proj
    w, a, b = layer.base_layer.weight, layer.lora_A[POLICY].weight, layer.lora_B[POLICY].weight
    m = layer.lora_magnitude_vector[POLICY].weight
    assert a.shape == (4, 32) and b.shape == (48, 4)
    v = w + 6 / math.sqrt(4) * b @ a
    expected = torch.stack([m[i] * v[i] / v[i].square().sum().sqrt() for i in range(48)])
    adapter = adapter_weights(policy)
    assert adapter is not None
    torch.testing.assert_close(merge_adapter("model.layers.1.mlp.up_proj.weight", w, adapter), expected)
    torch.testing.assert_close(layer(torch.eye(32)).T, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_adapter_does_not_change_the_model(options: dict[str, Any], dtype: torch.dtype) -> None:
    policy = model().to(dtype)
    scale = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    autocast = torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16)  # as in a run
    with autocast:
        before = logits(policy)
    LoRA(**options).add_to(policy)
    with autocast:
        torch.testing.assert_close(logits(policy), before, rtol=scale, atol=scale)
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {t.dtype for t in base_tensors(policy).values()} == {dtype}
    for layer in policy.modules():
        for sizes in getattr(layer, "lora_magnitude_vector", {}).values():
            rows: Any = layer.base_layer.weight
            torch.testing.assert_close(sizes.weight, rows.float().norm(dim=1), rtol=1e-6, atol=1e-6)


def test_all_linear_covers_every_linear_layer_below_the_head() -> None:
    for tied in (True, False):
        assert LoRA().targets(model(tied)) == LAYERS
    classifier = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1, pad_token_id=0))
    LoRA(rank=2).add_to(classifier)
    assert not any("score" in name for name, p in classifier.named_parameters() if p.requires_grad)
    assert {name.split(".")[-4] for name, p in classifier.named_parameters() if p.requires_grad} == set(LAYERS)


def test_router_that_is_a_linear_layer_gets_no_adapter() -> None:
    """Its forward returns the chosen experts, too, which a linear layer with an adapter does not."""
    sizes = {**SIZES, "num_local_experts": 4}
    policy = PhimoeForCausalLM(PhimoeConfig(**sizes))
    assert isinstance(policy.model.layers[0].mlp.router, nn.Linear)
    assert LoRA().targets(policy) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    LoRA(rank=2).add_to(policy)
    assert policy(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_unknown_target_modules_raise() -> None:
    for name in ("lm_head", "embed_tokens", "norm", "query"):
        with pytest.raises(UserError, match=f"names {name}, but LlamaForCausalLM .* choose from down_proj, gate_proj"):
            LoRA(target_modules=["q_proj", name]).config(model())
    bad: list[dict[str, Any]] = [
        {"rank": 0},
        {"alpha": 0},
        {"alpha": math.nan},
        {"dropout": 1.0},
        {"target_modules": "q_proj"},
        {"target_modules": []},
    ]
    for options in bad:
        with pytest.raises(UserError, match=f"(LoRA|lora).{next(iter(options))} is"):
            LoRA(**options)


def test_two_adapters_on_one_base_are_independent() -> None:
    policy = model()
    before = logits(policy)
    LoRA(rank=4).add_to(policy)
    scrambled(policy)
    alone = logits(policy)
    LoRA(rank=2).add_to(policy, CRITIC)
    scrambled(policy, CRITIC)
    assert torch.equal(logits(policy), alone)
    with use_adapter(policy, None):
        torch.testing.assert_close(logits(policy), before)
    with use_adapter(policy, CRITIC):
        other = logits(policy)
    assert (other - alone).abs().max() > 0.1 and (other - before).abs().max() > 0.1
    assert torch.equal(logits(policy), alone)
    mine = {id(p) for p in trainable_parameters(policy)}
    for name, p in policy.named_parameters():
        assert p.requires_grad == (".lora_" in name)
        assert (id(p) in mine) == (".lora_" in name and f".{POLICY}." in name)
    adapter = adapter_weights(policy, CRITIC)
    assert adapter is not None and adapter.config["r"] == 2
    assert {t.shape[0] for name, t in adapter.tensors.items() if name.endswith("lora_A.weight")} == {2}
    assert base_tensors(policy).keys() == model().state_dict().keys()


def test_base_tensors_have_hugging_face_names() -> None:
    torch.manual_seed(0)
    plain = Qwen2(Qwen2Config(**SIZES, tie_word_embeddings=True))
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    assert any(name.endswith("q_proj.bias") for name in state)
    LoRA(rank=2).add_to(plain)
    tensors = base_tensors(plain)
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    assert adapter_weights(model()) is None


def test_checkpoint_of_another_adapter_raises() -> None:
    def record(quantization: object = None, **options: Any) -> dict[str, Any]:
        return {"adapter": LoRA(**options).config(model()), "quantization": quantization}

    check_same_adapter(record(), record(dropout=0.5))
    check_same_adapter({}, {"adapter": None, "quantization": None})  # a checkpoint without adapter options
    refusals: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"adapter": None}, record(), "holds all weights, and this run trains a LoRA adapter"),
        (record(), {"adapter": None, "quantization": None}, "holds a LoRA adapter, and this run trains all weights"),
        (record(rank=8), record(), "lora r 8, this run 16"),
        (record(alpha=8), record(), "lora_alpha 8, this run 32"),
        (record(target_modules=["q_proj"]), record(), r"target_modules \['q_proj'\]"),
        (record(rslora=True), record(), "use_rslora True"),
        (record({"type": "nf4"}), record(), "quantization {'type': 'nf4'}, this run None"),
    ]
    for saved, wanted, words in refusals:
        with pytest.raises(UserError, match=f"--ckpt_path: the checkpoint .*{words}.*--model.lora"):
            check_same_adapter(saved, wanted)


def test_adapter_without_peft_cast_has_the_same_gradient_and_saves_less() -> None:
    """Under autocast PEFT's cast of inputs to float32 is undone at once, but each adapter saves a copy of its own."""
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    sizes = []
    for cast in (True, False):
        torch.manual_seed(0)
        policy = LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16()
        LoRA(rank=4).add_to(policy)
        for module in policy.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = cast or module.cast_input_dtype_enabled
                torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
        saved: dict[int, int] = {}

        def save(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            logits = policy(IDS).logits
        logits.float().logsumexp(-1).sum().backward()
        results.append((logits, {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}))
        sizes.append(sum(saved.values()))
    assert len(results[0][1]) == 2 * 14
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert sizes[1] < 0.9 * sizes[0], sizes
