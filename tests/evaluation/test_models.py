"""Models are resolved before weights are read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlmt.errors import UserError
from rlmt.evaluation.models import EndpointModel, LocalModel, default_name, resolve_model, resolve_models
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.assets import save_policy_assets
from rlmt.models.loading import load_policy, load_tokenizer

Exported = Callable[[str], Path]


def write_checkpoint(folder: Path, policy: Path, format: ThinkingFormat) -> Path:
    """A checkpoint as `rlmt fit` writes it, of the weights in a model folder."""
    model, tokenizer = load_policy(policy), load_tokenizer(policy)
    save_policy_assets(folder / "policy", model.config, tokenizer, format, format.stop_token_ids(tokenizer))
    weights = {f"policy.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights, "rlmt": {"policy": "x", "format": format.to_dict()}}, folder / "last.ckpt")
    return folder / "last.ckpt"


def local(source: str, **options: object) -> LocalModel:
    model = resolve_model(source, **options)  # type: ignore[arg-type]
    assert isinstance(model, LocalModel)
    return model


def test_folder_has_its_saved_format_and_name(exported: Exported) -> None:
    model = local(str(exported("zero_think")))
    assert (model.name, model.format.name) == ("zero_think", "zero_think")
    assert local(f"RLMT={exported('zero_think')}").name == "RLMT"


def test_checkpoint_is_resolved_without_export_and_loads_as_its_weights(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "rlhf" / "version_0" / "checkpoints"
    checkpoint = write_checkpoint(run, tiny / "policy", ThinkingFormat("no_think"))
    model = local(str(checkpoint))
    assert (model.name, model.format.name) == ("rlhf-last", "no_think")
    with model.weights() as folder:
        found, expected = load_policy(folder).state_dict(), load_policy(tiny / "policy").state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not Path(folder).exists()


def test_equals_sign_in_an_existing_path_is_no_name(exported: Exported, tmp_path: Path) -> None:
    folder = shutil.copytree(exported("think"), tmp_path / "step=5")
    assert local(str(folder)).source == str(folder)


def test_fingerprint_changes_with_weights_and_format_and_not_with_the_place(exported: Exported, tmp_path: Path) -> None:
    original = local(str(exported("think"))).fingerprint
    copy = shutil.copytree(exported("think"), tmp_path / "copy")
    assert local(str(copy)).fingerprint == original
    weights = load_file(copy / "model.safetensors")
    name = min(weights, key=lambda name: weights[name].numel())
    weights[name].view(-1)[0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert local(str(copy)).fingerprint != original
    assert local(str(exported("no_think"))).fingerprint != original


def test_endpoint_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "gpt.yaml"
    file.write_text("base_url: http://127.0.0.1:1/v1\nmodel: vendor/some-model\nformat: think\nmax_in_flight: 2\n")
    model = resolve_model(str(file))
    assert isinstance(model, EndpointModel)
    assert (model.name, model.endpoint.max_in_flight) == ("some-model", 2)
    assert model.format == ThinkingFormat("think", prefill=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is not YAML"),
        ("- a", "holds no options"),
        ("base_url: http://127.0.0.1:1", "model is not set"),
        ("base_url: http://127.0.0.1:1\nmodel: m\nkey: sk-secret", "key"),
        ("base_url: http://127.0.0.1:1\nmodel: m\nmax_in_flight: 0", "max_in_flight"),
        ("base_url: ftp://x\nmodel: m", "base_url"),
        ("base_url: http://127.0.0.1:1\nmodel: m\nformat: thinking", "format is 'thinking'"),
    ],
)
def test_invalid_endpoint_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        resolve_model(str(file))
    assert message in str(error.value) and "\n" not in str(error.value) and "sk-secret" not in str(error.value)
    assert str(error.value).startswith(str(file)) and str(error.value).endswith(".")


def test_unusable_models_are_one_line(tiny: Path, exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "x.ckpt").write_bytes(b"")
    cases = {
        str(tiny / "policy"): "stores no thinking format",
        str(tmp_path / "adapter"): "is an adapter without its model",
        str(tmp_path / "x.ckpt"): "there is no folder policy beside it",
        str(tmp_path / "nothing" / "here"): "no such folder",
        str(tmp_path / "no.yaml"): "cannot be read",
        str(tiny / "reward"): "not a causal language model",
    }
    for source, message in cases.items():
        with pytest.raises(UserError, match=message):
            resolve_model(source)
    with pytest.raises(UserError, match="was trained with"):
        resolve_model(str(exported("think")), "no_think")


def test_models_with_one_name_are_refused(exported: Exported) -> None:
    with pytest.raises(UserError, match="another model is named A, too"):
        resolve_models([f"A={exported('think')}", f"A={exported('no_think')}"])


def test_default_name_is_that_of_the_run_or_folder(tmp_path: Path) -> None:
    assert default_name("org/Some-Model 7B") == "Some-Model-7B"
    checkpoint = tmp_path / "a" / "version_3" / "checkpoints" / "step=5.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    assert default_name(str(checkpoint), is_checkpoint=True) == "a-step-5"
