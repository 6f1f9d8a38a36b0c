"""Attention within packed rows against attention of each row, number by number."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen as torch_varlen
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronConfig,
    Qwen3NextConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlmt.algorithms import GRPO
from rlmt.engines import TransformersEngine
from rlmt.errors import UserError
from rlmt.models import varlen
from rlmt.models.activation_checkpointing import _save_products
from rlmt.models.attention import attention_options
from rlmt.models.loading import load_policy
from rlmt.models.rows import row_states, stack_rows
from rlmt.models.varlen import VARLEN, PackedMask, register_varlen, supports_varlen, varlen_attention
from rlmt.modules import SFT, RewardModeling, RLMTModule
from rlmt.rewards import ClassifierReward
from rlmt.types import Prompt, SampleRequest, Sampling, Status

LENGTHS = [3, 1, 6, 2]


class Layer(nn.Module):
    """What transformers' attention reads of a layer."""

    is_causal = True
    num_key_value_groups = 2


def slow(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """[T, heads, V] from [heads, T, D]: each token attends to those of its row, itself included, up to the window."""
    out = torch.zeros(query.shape[1], query.shape[0], value.shape[-1], dtype=query.dtype)
    start = 0
    for length in LENGTHS:
        for i in range(start, start + length):
            first = start if window is None else max(start, i - window + 1)
            for head in range(query.shape[0]):
                logits = (
                    torch.tensor([float(query[head, i] @ key[head // 2, j]) for j in range(first, i + 1)]) * scaling
                )
                weights = logits.softmax(0).to(value.dtype)
                out[i, head] = weights @ value[head // 2, first : i + 1]
        start += length
    return out


def states(width: int = 8, value_width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Query of four heads, key and value of two."""
    torch.manual_seed(0)
    total = sum(LENGTHS)
    return torch.randn(1, 4, total, width), torch.randn(1, 2, total, width), torch.randn(1, 2, total, value_width)


BOUNDARIES = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> tuple[Tensor, None]:
    mask = PackedMask(window)
    return varlen_attention(Layer(), query, key, value, mask, 0.0, 0.3, row_boundaries=BOUNDARIES, row_lengths=LENGTHS)


@pytest.mark.parametrize("window", [None, 1, 2, 4, 100])
def test_attention_is_that_of_each_row(window: int | None) -> None:
    query, key, value = states(value_width=5)
    out, weights = packed_attention(query, key, value, window)
    assert weights is None
    torch.testing.assert_close(out[0], slow(query[0], key[0], value[0], 0.3, window))


@pytest.mark.parametrize("window", [None, 2])
def test_kernel_gets_what_it_documents(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel runs on GPUs only; a slow one in its place checks and follows its documentation."""
    query, key, value = states(width=16, value_width=8)

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts_q: Tensor,
        starts_k: Tensor | None,
        max_q: int,
        max_k: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool = False,
    ) -> Tensor:
        assert q.shape == (12, 4, 16) and k.shape == v.shape == (12, 2, 16)  # values as wide as queries
        assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))
        assert starts_q.dtype == torch.int32 and torch.equal(starts_q, BOUNDARIES) and starts_k is starts_q
        assert max_q == max_k == 6 and enable_gqa
        left, right = window_size  # tokens before and after; -1 is all
        assert right == 0 and (left == -1) == (window is None)
        return slow(*(x.transpose(0, 1) for x in (q, k, v)), scale, None if left == -1 else left + 1)

    monkeypatch.setattr(torch_varlen, "varlen_attn", kernel)
    out = varlen._kernel(query, key, value, BOUNDARIES, 6, 0.3, window)
    expected, _ = packed_attention(query, key, value, window)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("device", "dtype", "size", "capability", "taken"),
    [
        ("cuda", torch.bfloat16, 128, (8, 0), True),
        ("cuda", torch.float16, 256, (9, 0), True),
        ("cuda", torch.bfloat16, 128, (7, 5), False),  # a T4
        ("cuda", torch.float32, 128, (9, 0), False),
        ("cuda", torch.bfloat16, 512, (9, 0), False),
        ("cuda", torch.bfloat16, 20, (9, 0), False),
        ("cpu", torch.bfloat16, 128, (9, 0), False),
    ],
)
def test_kernel_computes_what_it_can(
    device: str, dtype: torch.dtype, size: int, capability: Any, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query: Any = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 2, 12, size))
    assert varlen._kernel_takes(query) == taken


def test_selective_checkpointing_keeps_the_kernels_result() -> None:
    operator = torch.ops.torch_attn._varlen_attn.default
    assert _save_products(None, operator) == torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE


SIZES: dict[str, Any] = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
WINDOWED: dict[str, Any] = {  # PhiMoE and Qwen2-MoE have their window in the mask alone
    "mistral": {},
    "phimoe": {"num_local_experts": 2},
    "qwen2_moe": {
        "use_sliding_window": True,
        "layer_types": ["sliding_attention"] * 3,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    },
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8},
}


@pytest.mark.parametrize("family", WINDOWED)
def test_a_sliding_window_holds_in_packed_rows_and_in_rows_that_are_not(family: str) -> None:
    options = {"num_key_value_heads": 1, "num_hidden_layers": 3, "sliding_window": 4, "initializer_range": 0.5}
    config = AutoConfig.for_model(family, **SIZES | options | WINDOWED[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    rows = [torch.randint(0, 31, (n,)) for n in (13, 2, 9)]

    def states(packed: bool, rows: list[Tensor]) -> Tensor:
        ids, packing = stack_rows(rows, packed, torch.device("cpu"))
        at = [(i, k) for i, row in enumerate(rows) for k in range(len(row))]
        return row_states(model.get_decoder(), ids, packing, *torch.tensor(at).T)

    with torch.no_grad():
        expected = torch.cat([states(False, [row]) for row in rows])
        changed = rows[0].clone()
        changed[0] += 1  # 12 tokens before the last one, which three layers of windows of 4 see no more
        assert torch.equal(states(False, [changed])[-1], expected[12])
        model.set_attn_implementation(attention_options(config, VARLEN, "m")["attn_implementation"])
        for packed in (False, True):
            torch.testing.assert_close(torch.cat([states(packed, [row]) for row in rows]), expected)
        torch.testing.assert_close(states(True, rows), expected)


def test_layers_that_drop_the_boundaries_are_an_error() -> None:
    query, key, value = states()
    with pytest.raises(
        UserError, match="varlen, but Layer or its mask is not told where packed rows begin; leave the option out"
    ):
        varlen_attention(Layer(), query, key, value, PackedMask(None))


@pytest.mark.parametrize("kind", ["sft", "rl", "reward"])
def test_every_rank_knows_it_after_the_checks(kind: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under FSDP2 rank 0 alone loads a model, and the others receive it."""
    known = {name: kernel for name, kernel in AttentionInterface._global_mapping.items() if name != VARLEN}
    monkeypatch.setattr(AttentionInterface, "_global_mapping", known)
    assert VARLEN not in ALL_ATTENTION_FUNCTIONS.valid_keys()
    policy = str(tiny / "policy")
    module: Any
    if kind == "reward":
        module = RewardModeling(policy, attn_implementation=VARLEN)
        module.check_model_options(module.model_config, policy)
    else:
        reward = ClassifierReward(str(tiny / "reward"))
        module = SFT(policy, attn_implementation=VARLEN)
        if kind == "rl":
            module = RLMTModule(policy, reward, GRPO(), attn_implementation=VARLEN)
        module.check_model_options(module.policy_config, policy)
    assert VARLEN in ALL_ATTENTION_FUNCTIONS.valid_keys()


def test_padding_cache_and_engine_work_as_before(tiny: Path) -> None:
    samples = []
    for implementation in (None, VARLEN):
        policy = load_policy(tiny / "policy", "float32", implementation)
        engine: Any = TransformersEngine()
        engine.start(policy, None, 64, torch.float32)
        engine.sync(iter(policy.state_dict().items()), 1)
        requests = [SampleRequest([5, 6, 7, 8, 9], [0, 1]), SampleRequest([7], [2, 3])]
        samples.append(engine.generate(requests, Sampling(0.7, 16)))
        engine.close()
    assert samples[0].completion_ids == samples[1].completion_ids
    for one, other in zip(samples[0].logprobs, samples[1].logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_scores_of_packed_conversations_are_those_of_padded_ones(tiny: Path) -> None:
    prompts = [Prompt(i, [{"role": "user", "content": "word " * n}]) for i, n in enumerate((1, 9, 3, 20))]
    scores = []
    for implementation, budget in ((None, 4096), (VARLEN, 4096), (VARLEN, 64)):
        reward = ClassifierReward(
            str(tiny / "reward"), max_length=64, tokens_per_batch=budget, attn_implementation=implementation
        )
        reward.load()
        scores.append(reward.score(prompts, ["yes", "no " * 7, "", "so"], [Status.OK] * 4))
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(scores[2], scores[0], rtol=0, atol=1e-5)


REFUSED = {
    "a cap": Gemma2Config(),
    "sinks": GptOssConfig(),
    "linear attention": Qwen3NextConfig(),
    "layers that drop the boundaries": NemotronConfig(),
    "attention in both directions": Gemma3TextConfig(use_bidirectional_attention=True),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_have_it_are_refused(name: str) -> None:
    config = REFUSED[name]
    assert not supports_varlen(config)
    with pytest.raises(
        UserError, match=rf"attn_implementation is varlen, but m \({config.model_type}\) .*leave the option out"
    ):
        attention_options(config, VARLEN, "m")
    assert supports_varlen(LlamaConfig())


def test_an_exported_model_is_a_plain_one(tmp_path: Path) -> None:
    """The implementation is the trainer's, and no part of a saved model."""
    register_varlen()
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM._from_config(LlamaConfig(vocab_size=31, **shape), attn_implementation=VARLEN).save_pretrained(
        tmp_path
    )
    assert VARLEN not in (tmp_path / "config.json").read_text()
    assert math.isfinite(load_policy(tmp_path, "float32")(input_ids=torch.tensor([[1]])).logits.sum())
