import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, Gemma2Config, LlamaConfig

from rlmt.errors import UserError
from rlmt.models.loading import check_head, load_config, load_policy, load_tokenizer, max_positions


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny / "policy", tmp_path / "policy"))


def _edit(path: Path, **changes: object) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def _refused(load, *args, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load(*args)
    assert "\n" not in str(caught.value)


def test_weights_are_those_of_the_file(folder):
    stored = load_file(folder / "model.safetensors")
    policy = load_policy(folder)
    assert not policy.training
    assert policy.state_dict().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in policy.state_dict().items())
    half = load_policy(folder, "bfloat16", attn_implementation="eager")
    assert half.dtype is torch.bfloat16
    assert half.config._attn_implementation == "eager"
    _refused(load_policy, folder, "int3", match="dtype 'int3'")


def test_pad_token_stays_in_memory(folder):
    _edit(folder / "tokenizer_config.json", pad_token=None)
    before = (folder / "tokenizer_config.json").read_bytes()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert (folder / "tokenizer_config.json").read_bytes() == before
    _edit(folder / "tokenizer_config.json", eos_token=None)
    _refused(load_tokenizer, folder, match="neither a pad nor an eos token")


def test_paths(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no runs/tiny
    _refused(load_config, "runs/tiny/policy", match="run `rlmt tiny` first")
    _refused(load_config, tmp_path / "none", match="no such folder")
    _refused(load_config, "someone/some-model", match="from the hub")
    _refused(load_tokenizer, "someone/some-model", match="from the hub")
    _refused(load_config, folder / "config.json", match="is a file")


def test_incomplete_folders(folder):
    weights = folder / "model.safetensors"
    # Copies, for load_file maps the file that is overwritten below.
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    _refused(load_policy, folder, match="damaged")
    tensors.pop("lm_head.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    _refused(load_policy, folder, match="lack 1 tensors of the model, such as lm_head.weight")
    torch.save(tensors, folder / "pytorch_model.bin")
    weights.unlink()
    _refused(load_policy, folder, match="no safetensors weights")
    (folder / "tokenizer.json").unlink()
    _refused(load_tokenizer, folder, match="no tokenizer")
    (folder / "config.json").write_text("{")
    _refused(load_config, folder, match="JSON")
    (folder / "config.json").unlink()
    _refused(load_config, folder, match="no config.json")


def test_models_that_are_no_policy(tiny, folder):
    _refused(load_policy, tiny / "reward", match="holds a LlamaForSequenceClassification")
    _edit(folder / "config.json", model_type="vit", architectures=["ViTModel"])
    _refused(load_policy, folder, match="vit is not a causal language model")
    _edit(folder / "config.json", model_type="nobodys")
    _refused(load_config, folder, match="model type")
    (folder / "code.py").write_text("raise SystemExit('ran remote code')")
    _edit(folder / "config.json", auto_map={"AutoConfig": "code.Config"})
    _refused(load_config, folder, match="never runs")


def test_max_positions():
    assert max_positions(LlamaConfig(max_position_embeddings=77)) == 77
    _refused(max_positions, BloomConfig(), match="max_position_embeddings")


def test_families_that_change_their_logits_are_refused() -> None:
    with pytest.raises(UserError, match="final_logit_softcapping"):
        check_head(Gemma2Config(), "some/model")
    check_head(LlamaConfig(), "some/model")
