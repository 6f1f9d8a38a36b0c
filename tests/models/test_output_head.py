"""The output head that is measured on a model equals the model's own logits, and other heads raise."""

from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from rlmt.errors import UserError
from rlmt.models.loading import meta_model
from rlmt.models.output_head import output_head

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any], float, float | None]] = {
    "Llama": (LlamaConfig, LlamaForCausalLM, {}, 1.0, None),
    "Phi: a bias": (PhiConfig, PhiForCausalLM, {}, 1.0, None),
    "Gemma 2: a soft cap": (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 3.0}, 1.0, 3.0),
    "Cohere multiplies": (CohereConfig, CohereForCausalLM, {"logit_scale": 0.3}, 0.3, None),
    "Granite divides": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 5.0}, 0.2, None),
    "HyperCLOVA X multiplies": (HyperCLOVAXConfig, HyperCLOVAXForCausalLM, {"logits_scaling": 5.0}, 5.0, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_output_head_equals_the_models_own_logits(name: str) -> None:
    config_class, model_class, options, scale, soft_cap = MODELS[name]
    torch.manual_seed(0)
    config = config_class(**SIZES, **options)
    policy = model_class(config).eval()
    if policy.lm_head.bias is not None:
        torch.nn.init.normal_(policy.lm_head.bias)
    ids = torch.arange(7)[None]
    with torch.no_grad():
        hidden = policy.get_decoder()(input_ids=ids).last_hidden_state[0]
        head = output_head(policy)
        torch.testing.assert_close(head.logits(hidden), policy(ids).logits[0], rtol=1e-5, atol=1e-5)
    assert head.scale == pytest.approx(scale, rel=1e-6)
    assert head.soft_cap == (None if soft_cap is None else pytest.approx(soft_cap, rel=1e-6))
    on_meta = output_head(meta_model(config))  # as before any weights are loaded
    assert (on_meta.scale, on_meta.soft_cap) == (head.scale, head.soft_cap)


def test_measuring_leaves_the_model_as_it_was() -> None:
    policy = LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    ids = torch.arange(5)[None]
    before, state = policy(ids).logits, torch.get_rng_state()
    output_head(policy)
    assert "forward" not in policy.lm_head.__dict__ and "forward" not in policy.model.__dict__
    assert policy.training and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(policy(ids).logits, before)


class Masked(LlamaForCausalLM):
    """Forbids one token."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits[..., 7] = -torch.inf
        return outputs


class Truncated(LlamaForCausalLM):
    """Leaves out padded rows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits[..., :60]
        return outputs


class Shifted(LlamaForCausalLM):
    """Adds a constant."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + torch.arange(61)
        return outputs


class Scaled(LlamaForCausalLM):
    """Scales the hidden states before the output projection."""

    def forward(self, input_ids: Any, **kwargs: Any) -> Any:
        outputs = self.model(input_ids=input_ids)
        outputs.logits = self.lm_head(2 * outputs[0])
        return outputs


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Masked, "other than by a scale or soft cap"),
        (Shifted, "other than by a scale or soft cap"),
        (Truncated, "60 logits for 61 rows"),
        (Scaled, "does not read the decoder's last hidden states"),
    ],
)
def test_other_heads_raise_in_one_line(kind: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        output_head(kind(LlamaConfig(**SIZES)))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_lm_head_multiplier_of_a_hybrid_is_measured() -> None:
    config = FalconH1Config(**SIZES, lm_head_multiplier=0.25, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8)
    assert output_head(meta_model(config)).scale == 0.25
