"""Turns a checkpoint into a Hugging Face folder that transformers and vLLM load.

A checkpoint of rlmt holds the policy's weights under `state_dict["policy.<name>"]` and says under `rlmt` where the
policy began and in which format it thinks. Everything else that a folder needs (config, tokenizer, chat template) is
written once a run beside the checkpoints, in `policy/`, by `save_policy_assets`; so an export needs neither the initial
model nor the network nor a GPU. Weights are read lazily and go out with the bits they came in with, unless a dtype is
asked for.

The checkpoint of a LoRA run holds the adapter alone. It becomes either whole weights, for which the model that it was
trained on is read again and passed through (`rlmt.export.merge`), or an adapter folder as PEFT writes it.
"""

from __future__ import annotations

import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from rlmt.checkpointing.files import read_checkpoint
from rlmt.errors import UserError
from rlmt.export.merge import adapted_layers, check_fits, merge, open_base
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.adapters import CRITIC, PEFT_PREFIX, POLICY, is_adapter
from rlmt.models.assets import POLICY_ASSETS, REWARD_ASSETS, save_policy_assets, save_reward_assets
from rlmt.models.loading import load_config, load_tokenizer, meta_model
from rlmt.models.quantization import quantized_weights
from rlmt.types import AdapterWeights

_ADAPTER_WEIGHT = re.compile(rf"(.+)\.lora_(A|B|magnitude_vector)\.{POLICY}\.weight")


@dataclass(frozen=True)
class _Kind:
    """What tells the export of a policy from that of a reward model."""

    assets: str
    """Folder beside the checkpoints."""
    prefix: str
    """Of its weights' names in a checkpoint."""
    base: str
    """Under which key the checkpoint says what it was trained from."""
    auto: Any
    """transformers' class that loads it."""


_POLICY = _Kind(POLICY_ASSETS, "policy.", "policy", AutoModelForCausalLM)
_REWARD = _Kind(REWARD_ASSETS, "model.", "model", AutoModelForSequenceClassification)


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint of `rlmt fit`."""

    path: Path
    kind: _Kind
    about: dict[str, Any]
    """What the module says in it."""
    weights: dict[str, Tensor]
    """Under the model's own names."""

    @property
    def assets(self) -> Path:
        """The folder beside it."""
        return self.path.parent / self.kind.assets

    @property
    def head(self) -> dict[str, Tensor]:
        """What is trained in full beside an adapter: a reward model's head, nothing of a policy."""
        return {name: tensor for name, tensor in self.weights.items() if not is_adapter(name)}

    def save_assets(self, out: Path, config: PretrainedConfig) -> None:
        """Writes all of the model's folder but the weights."""
        tokenizer = load_tokenizer(self.assets)
        if self.kind is _POLICY:
            save_policy_assets(out, config, tokenizer, ThinkingFormat.from_dict(self.about["format"]))
        else:
            save_reward_assets(out, config, tokenizer)


def export(
    ckpt: Path,
    out: Path,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    what: Literal["merged", "adapter"] = "merged",
    base: str | None = None,
) -> None:
    """Turns a checkpoint into a Hugging Face folder: weights, config, tokenizer, chat template and thinking format.

    Args:
        ckpt: Checkpoint of a run, in the folder where the run wrote it: a file, or a folder of shards.
        out: Folder to write; must be new or empty.
        dtype: Precision of the exported weights; by default the one that the trained weights, the base to merge into
            or the adapter are stored in.
        what: What to make of a LoRA checkpoint: `merged` weights that load like any model, or the `adapter` alone, for
            PEFT and vLLM's LoRA requests.
        base: Folder or hub name of the model that the adapter was trained on, if it is no longer where the run found
            it.

    Raises:
        UserError: If the checkpoint is missing, damaged or not one of rlmt, the files beside it are missing or do not
            belong to its weights, the base cannot be read, or `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; name a new folder to export to")
    if not ckpt.exists():
        raise UserError(f"{ckpt}: no such checkpoint")
    saved = _open(ckpt)
    adapted = saved.about.get("adapter") is not None
    if not adapted and (what == "adapter" or base is not None):
        option = "--what adapter" if what == "adapter" else "--base"
        raise UserError(f"{ckpt}: holds all of the model's weights and no adapter; leave {option} out")
    target: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
    with _whole_or_nothing(out) as folder:
        if adapted:
            write = _export_merged if what == "merged" else _export_adapter
            about = write(saved, base or saved.about[saved.kind.base], folder, target)
        else:
            about = _export_all(saved, folder, target)
    print(f"{out}: {about}")


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which takes its place once all is written.

    An export that is cut short leaves nothing under the name `out`; what it leaves beside it goes with the next one.
    """
    if out.is_dir():
        try:
            out.rmdir()
        except OSError as error:
            raise UserError(f"{out}: cannot be replaced ({error.strerror}); name a new folder in it") from error
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open(path: Path) -> _Checkpoint:
    """A checkpoint and the folder that belongs to it."""
    checkpoint = _read_sharded(path) if path.is_dir() else read_checkpoint(path, map_location="cpu", mmap=True)
    if not isinstance(checkpoint, dict) or "rlmt" not in checkpoint or "state_dict" not in checkpoint:
        raise UserError(f"{path}: is not a checkpoint of `rlmt fit`")
    about = checkpoint["rlmt"]
    kind = _REWARD if about.get("module") == "RewardModeling" else _POLICY
    weights = {
        name.removeprefix(kind.prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(kind.prefix) and f".{CRITIC}." not in name
    }
    saved = _Checkpoint(path, kind, about, weights)
    if not saved.assets.is_dir():
        raise UserError(f"{saved.assets}: not found; export the checkpoint from the folder where its run wrote it")
    return saved


def _adapter(saved: _Checkpoint) -> AdapterWeights:
    """The adapter under the names of PEFT's files; a critic's beside it stays behind."""
    named = {}
    for name, tensor in saved.weights.items():
        if match := _ADAPTER_WEIGHT.fullmatch(name):
            layer, part = match.groups()
            # PEFT's files keep DoRA's row sizes, a module in memory, under the name of the plain tensor they once were.
            suffix = "" if part == "magnitude_vector" else ".weight"
            named[f"{PEFT_PREFIX}{layer}.lora_{part}{suffix}"] = tensor
    if not named:
        raise UserError(f"{saved.path}: says that it holds an adapter, and there is none in it; use an earlier one")
    return AdapterWeights(saved.about["adapter"], named)


def _export_all(saved: _Checkpoint, out: Path, dtype: torch.dtype | None) -> str:
    model = _assemble(saved, dtype)
    saved.save_assets(out, model.config)
    if saved.kind is _POLICY:
        model.generation_config = GenerationConfig.from_pretrained(out)
    model.save_pretrained(out)
    return f"{type(model).__name__}, {model.num_parameters():,} parameters in {model.dtype}"


def _export_merged(saved: _Checkpoint, source: str, out: Path, dtype: torch.dtype | None) -> str:
    adapter, base = _adapter(saved), open_base(source)
    check_fits(base, adapter)
    config, quantization = load_config(saved.assets), saved.about.get("quantization")
    held = cast(torch.dtype, config.dtype or torch.float32)
    layers = adapted_layers(adapter)
    config.dtype = dtype or base.tensors[f"{layers[0]}.weight"].dtype
    config.architectures = [type(meta_model(config, saved.kind.auto)).__name__]
    saved.save_assets(out, config)
    four_bits: tuple[frozenset[str], bool] = (frozenset(), False)
    if quantization is not None:
        four_bits = quantized_weights(config, saved.kind.auto), quantization["double_quant"]
    merge(base, adapter, out, held, dtype, *four_bits, saved.head)
    return f"{source} with the adapter of {len(layers)} layers merged into it, in {config.dtype}"


def _export_adapter(saved: _Checkpoint, source: str, out: Path, dtype: torch.dtype | None) -> str:
    adapter, head = _adapter(saved), saved.head
    folder = Path(source).expanduser()
    name = str(folder.resolve()) if folder.is_dir() else source  # a relative path would be wrong from anywhere else
    load_tokenizer(saved.assets).save_pretrained(out)
    options: dict[str, Any] = {"base_model_name_or_path": name, "inference_mode": True}
    if saved.kind is _POLICY:
        ThinkingFormat.from_dict(saved.about["format"]).save(out)
    else:
        options |= {"task_type": "SEQ_CLS", "modules_to_save": sorted({name.split(".")[0] for name in head})}
    LoraConfig(**{**adapter.config, **options}).save_pretrained(str(out))
    trained = adapter.tensors | {PEFT_PREFIX + key: tensor for key, tensor in head.items()}
    tensors = {key: (t if dtype is None else t.to(dtype)).contiguous() for key, t in trained.items()}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    notes = [f"adapter of {len(adapted_layers(adapter))} layers for {name}"]
    if saved.kind is _REWARD:
        notes.append("Its base is loaded as a sequence classifier with num_labels=1.")
    if saved.about.get("quantization") is not None:
        notes.append("It was trained on this model in 4 bits (NF4): load that so, or export --what merged.")
    return "\n".join(notes)


def _assemble(saved: _Checkpoint, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model that holds a checkpoint's weights themselves, without a copy; no weight is ever made up."""
    weights, where = saved.weights, f"use the folder {saved.kind.assets}/ that the same run wrote"
    if dtype is not None:
        weights = {name: t.to(dtype) if t.is_floating_point() else t for name, t in weights.items()}
    model = meta_model(load_config(saved.assets), saved.kind.auto)
    model.train(False)
    wanted = model.state_dict()
    for name, tensor in weights.items():
        if name in wanted and tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)}, the config beside it wants {tuple(wanted[name].shape)}"
            raise UserError(f"{saved.path}: {name} has shape {shapes}; {where}")
    found = model.load_state_dict(weights, strict=False, assign=True)
    # Tying again makes tied weights one tensor, which is then written once.
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left or found.unexpected_keys:
        name, what = (left[0], "missing from") if left else (found.unexpected_keys[0], "unknown to the config beside")
        raise UserError(f"{saved.path}: {name} is {what} it; {where}")
    return model


class _Plain(pickle.Unpickler):
    """Makes nothing but torch's own records of where shards lie."""

    def find_class(self, module: str, name: str) -> Any:
        kind = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if kind or name in _PLAIN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


_PLAIN = {
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
}
"""Names that may be made, by module; exact ones, since a dotted name would reach what a module has imported."""


def _check_plain(metadata: Path) -> None:
    """Refuses a pickle that would make anything else, before torch reads it."""
    try:
        with metadata.open("rb") as file:
            _Plain(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise UserError(f"{metadata}: is damaged, or holds objects other than tensors and plain values") from error


def _read_sharded(ckpt: Path) -> dict[str, Any]:
    """Reads a folder that FSDP wrote, on one process: the weights from its shards, the rest from meta.pt."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    if not ((ckpt / ".metadata").is_file() and (ckpt / "meta.pt").is_file()):
        raise UserError(f"{ckpt}: is a folder, but not a sharded checkpoint (.metadata and meta.pt are not in it)")
    _check_plain(ckpt / ".metadata")
    reader = FileSystemReader(ckpt)
    prefix = f"state_dict.{_POLICY.prefix}"
    flat: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        load(flat, storage_reader=reader, no_dist=True)
    weights = {name.removeprefix("state_dict."): tensor for name, tensor in flat.items()}
    return {**read_checkpoint(ckpt / "meta.pt", map_location="cpu", mmap=True), "state_dict": weights}
