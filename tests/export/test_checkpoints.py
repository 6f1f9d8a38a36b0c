"""`rlmt export` of full checkpoints: the folder equals the trained policy, and errors are one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from rlmt.errors import UserError
from rlmt.export.checkpoints import export
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.assets import save_policy_assets
from rlmt.models.loading import load_policy, load_tokenizer

FORMAT = ThinkingFormat(prefill=True)
PROBE = torch.arange(7, 39).view(2, 16)


def _trained(tiny: Path, tied: bool = False) -> torch.nn.Module:
    """The tiny policy with changed weights, as after training."""
    policy = load_policy(tiny / "policy")
    if tied:
        policy.config.tie_word_embeddings = True
        policy = AutoModelForCausalLM.from_config(policy.config).eval()
    with torch.no_grad():
        for i, parameter in enumerate(policy.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)), alpha=0.01)
    return policy


def _checkpoint(policy: torch.nn.Module) -> dict[str, object]:
    return {
        "state_dict": {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()},
        "rlmt": {"policy": "a/hub-name", "format": FORMAT.to_dict(), "version": 4},
        "epoch": 0,
    }


def _write(tiny: Path, run: Path, policy: torch.nn.Module) -> Path:
    save_policy_assets(run / "policy", policy.config, load_tokenizer(tiny / "policy"), FORMAT, [1])
    torch.save(_checkpoint(policy), run / "last.ckpt")
    return run / "last.ckpt"


def _check_error(*args, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        export(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
def test_export_equals_trained_policy(tiny, tmp_path, tied):
    policy = _trained(tiny, tied)
    out = tmp_path / "out"
    export(_write(tiny, tmp_path / "run", policy), out)
    loaded = load_policy(out)
    with torch.no_grad():
        assert torch.equal(loaded(PROBE).logits, policy(PROBE).logits)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert ThinkingFormat.load(out) == FORMAT
    before, after = load_tokenizer(tiny / "policy"), load_tokenizer(out)
    assert after.chat_template == before.chat_template
    assert after.encode("Bees <think> é") == before.encode("Bees <think> é")
    assert GenerationConfig.from_pretrained(out).eos_token_id == [before.eos_token_id]


def test_dtype_option_converts_the_weights(tiny, tmp_path):
    policy = _trained(tiny)
    export(_write(tiny, tmp_path / "run", policy), tmp_path / "out", "bfloat16")
    loaded = load_policy(tmp_path / "out")
    assert loaded.dtype is torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, policy.lm_head.weight.bfloat16())


def test_killed_export_leaves_no_folder_and_can_be_repeated(tiny, tmp_path, monkeypatch):
    ckpt, out = _write(tiny, tmp_path / "run", _trained(tiny)), tmp_path / "deep" / "out"
    leftover = tmp_path / "killed"

    def killed(folder: Path, target: Path) -> None:
        assert (
            not out.exists() and (folder / "model.safetensors").is_file()
        )  # the weights are written, and `out` does not exist yet
        shutil.copytree(folder, leftover)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", killed)
        export(ckpt, out)
    assert not list(out.parent.iterdir())  # Ctrl-C cleans up
    leftover.rename(out.with_name(".out.partial"))  # as SIGKILL leaves it
    (out.with_name(".out.partial") / "stale").touch()
    out.mkdir()  # an empty folder may exist
    export(ckpt, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"] and not (out / "stale").exists()
    load_policy(out)


def test_sharded_checkpoint_exports_the_trained_policy(tiny, tmp_path):
    policy = _trained(tiny)
    ckpt = _write(tiny, tmp_path / "run", policy).with_name("sharded.ckpt")
    saved = _checkpoint(policy)
    dcp.save(
        {"state_dict": saved.pop("state_dict"), "optimizer_0": {"state": {"x": torch.ones(3)}}},
        checkpoint_id=ckpt,
        no_dist=True,
    )
    torch.save(saved, ckpt / "meta.pt")
    export(ckpt, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(load_policy(tmp_path / "out")(PROBE).logits, policy(PROBE).logits)
    (ckpt / "meta.pt").unlink()
    _check_error(ckpt, tmp_path / "other", match="not a sharded checkpoint")


def test_invalid_checkpoints_and_folders_are_one_line_errors(tiny, tmp_path, monkeypatch):
    policy = _trained(tiny)
    ckpt, out = _write(tiny, tmp_path / "run", policy), tmp_path / "out"
    _check_error(tmp_path / "none.ckpt", out, match="no such checkpoint")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    _check_error(ckpt, tmp_path / "full", match="already exists")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    _check_error(ckpt, Path(), match="cannot be replaced")

    bad = ckpt.with_name("bad.ckpt")
    bad.write_bytes(ckpt.read_bytes()[: ckpt.stat().st_size // 2])
    _check_error(bad, out, match="damaged")
    bad.write_bytes(b"")
    _check_error(bad, out, match="damaged")
    torch.save({"state_dict": {}, "epoch": 1}, bad)
    _check_error(bad, out, match="not a checkpoint of `rlmt fit`")
    torch.save(torch.ones(3), bad)
    _check_error(bad, out, match="not a checkpoint of `rlmt fit`")

    missing = _checkpoint(policy)
    del missing["state_dict"]["policy.model.norm.weight"]
    torch.save(missing, bad)
    _check_error(bad, out, match="model.norm.weight is missing")
    extra = _checkpoint(policy)
    extra["state_dict"]["policy.extra"] = torch.ones(1)
    torch.save(extra, bad)
    _check_error(bad, out, match="extra is unknown")
    reshaped = _checkpoint(policy)
    reshaped["state_dict"]["policy.model.norm.weight"] = torch.ones(3)
    torch.save(reshaped, bad)
    _check_error(bad, out, match="model.norm.weight has shape")

    shutil.rmtree(ckpt.parent / "policy")
    _check_error(ckpt, out, match="not found")
    assert not out.exists()
