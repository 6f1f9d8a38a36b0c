import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BertConfig,
    BloomConfig,
    Gemma2Config,
    InklingTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    XLMConfig,
)

from rlmt.errors import UserError
from rlmt.models.loading import check_policy, frozen_copy, load_config, load_policy, load_tokenizer, max_positions
from rlmt.models.logprobs import token_logprobs
from rlmt.models.micro_batch import no_op_micro_batch
from rlmt.models.rope import check_vllm_rope


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny / "policy", tmp_path / "policy"))


def _edit(path: Path, **changes: object) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def _refusal(load, *args) -> str:
    """The one-line message of the UserError."""
    with pytest.raises(UserError) as caught:
        load(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_loaded_weights_equal_the_file(folder):
    stored = load_file(folder / "model.safetensors")
    policy = load_policy(folder)
    assert not policy.training
    assert policy.state_dict().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in policy.state_dict().items())
    half = load_policy(folder, "bfloat16", attn_implementation="eager")
    assert half.dtype is torch.bfloat16
    assert half.config._attn_implementation == "eager"
    assert "dtype 'int3'" in _refusal(load_policy, folder, "int3")


def test_pad_token_is_set_in_memory_only(folder):
    _edit(folder / "tokenizer_config.json", pad_token=None)
    before = (folder / "tokenizer_config.json").read_bytes()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert (folder / "tokenizer_config.json").read_bytes() == before
    _edit(folder / "tokenizer_config.json", eos_token=None)
    assert "neither a pad nor an eos token" in _refusal(load_tokenizer, folder)


def test_missing_and_relative_paths(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without runs/tiny
    assert "run `rlmt tiny` first" in _refusal(load_config, "runs/tiny/policy")
    assert "no such folder" in _refusal(load_config, tmp_path / "none")
    assert "the hub returned no" in _refusal(load_config, "someone/some-model")
    assert "the hub returned no" in _refusal(load_tokenizer, "someone/some-model")
    assert "is a file" in _refusal(load_config, folder / "config.json")


def test_incomplete_folders_raise(folder):
    weights = folder / "model.safetensors"
    # Copies, because load_file maps the file that is overwritten below.
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in _refusal(load_policy, folder)
    tensors.pop("lm_head.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "lack 1 tensors, such as lm_head.weight" in _refusal(load_policy, folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    weights.unlink()
    assert "no safetensors weights" in _refusal(load_policy, folder)
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in _refusal(load_tokenizer, folder)
    (folder / "config.json").write_text("{")
    assert "JSON" in _refusal(load_config, folder)
    (folder / "config.json").unlink()
    assert "no config.json" in _refusal(load_config, folder)


def test_models_other_than_causal_lms_raise(tiny, folder):
    assert "holds a LlamaForSequenceClassification" in _refusal(load_policy, tiny / "reward")
    _edit(folder / "config.json", model_type="vit", architectures=["ViTModel"])
    assert "vit is not a causal language model" in _refusal(load_policy, folder)
    _edit(folder / "config.json", model_type="nobodys")
    assert "model type" in _refusal(load_config, folder)
    (folder / "code.py").write_text("raise SystemExit('ran remote code')")
    _edit(folder / "config.json", auto_map={"AutoConfig": "code.Config"})
    assert "never runs" in _refusal(load_config, folder)


def test_max_positions_is_read_from_the_config():
    assert max_positions(LlamaConfig(max_position_embeddings=77)) == 77
    assert "max_position_embeddings" in _refusal(max_positions, BloomConfig())


@pytest.mark.parametrize("tied", [False, True])
def test_reference_in_16_bits_has_the_same_logprobs_under_autocast(tied: bool) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(**shape, **heads, tie_word_embeddings=tied, initializer_range=0.3)
    policy = Qwen2ForCausalLM(config)
    for name, parameter in policy.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    frozen, full = frozen_copy(policy, torch.bfloat16), frozen_copy(policy, torch.float32)
    batch = no_op_micro_batch(torch.device("cpu"))
    batch = replace(
        batch,
        input_ids=torch.arange(40).view(2, 20),
        rows=torch.tensor([0, 1] * 9),
        columns=torch.arange(18),
        targets=torch.arange(18),
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = token_logprobs(full, batch, 0.7).logprobs
        assert torch.equal(token_logprobs(frozen, batch, 0.7).logprobs, expected)
    # 2 bytes for each weight and bias of a linear layer, 4 for embeddings and norms.
    head = 0 if tied else 2 * 61 * 32
    layer = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 32 + 2 * 16) + 4 * 2 * 32
    assert sum(p.numel() * p.element_size() for p in frozen.parameters()) == 4 * 61 * 32 + head + 2 * layer + 4 * 32
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
    assert all(p.dtype is torch.float32 for p in [*policy.parameters(), *full.parameters()])


def test_policies_without_a_plain_decoder_or_head_raise() -> None:
    check_policy(Gemma2Config(), "some/model")  # a soft cap
    for config in (BertConfig(), XLMConfig(), BartConfig()):
        assert "is not a plain decoder" in _refusal(check_policy, config, "some/model")
    assert "the decoder's last hidden states" in _refusal(check_policy, InklingTextConfig(), "some/model")


def test_length_dependent_rope_limits_the_context() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0}
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **factors}
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    assert max_positions(Phi3Config(**sizes, original_max_position_embeddings=64, rope_parameters=longrope)) == 64
    assert max_positions(LlamaConfig(**sizes, rope_parameters=dynamic)) == 256
    assert max_positions(LlamaConfig(**sizes)) == 256
    check_vllm_rope(Phi3Config(**sizes, rope_parameters=longrope))
    assert "which vLLM scales" in _refusal(check_vllm_rope, LlamaConfig(**sizes, rope_parameters=dynamic))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_padding_changes_logits_only_beyond_the_context_of_the_rope(kind: str) -> None:
    """The reason for the limit: a longer row in the batch changes a short one."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 48}
    rope: dict[str, object] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        context = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
        config = Phi3Config(vocab_size=50, pad_token_id=0, **sizes, **context, rope_parameters=rope | factors)
        policy = Phi3ForCausalLM(config).eval()
    else:
        config = LlamaConfig(vocab_size=50, max_position_embeddings=16, **sizes, rope_parameters=rope)
        policy = LlamaForCausalLM(config).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        alone = policy(ids).logits[0]
        for padding, same in ((4, True), (20, False)):
            padded = policy(torch.nn.functional.pad(ids, (0, padding))).logits[0, :12]
            assert torch.allclose(padded, alone, atol=1e-5) == same
    assert max_positions(policy.config) == 16
