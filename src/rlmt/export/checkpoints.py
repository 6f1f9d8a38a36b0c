"""Exports a checkpoint to a Hugging Face folder that transformers and vLLM load.

A checkpoint stores the policy's weights under `state_dict["policy.<name>"]`, and under `rlmt` the model that the run
started from and the thinking format. Everything else that a folder needs (config, tokenizer, chat template) is written
once a run to `policy/` next to the checkpoints, by `save_policy_assets`. An export therefore needs no initial model, no
network and no GPU. Weights are memory-mapped and exported bit for bit, unless a dtype is requested.

The checkpoint of a LoRA run stores only the adapter. It is exported either as full weights, merged into the model that
the adapter was trained on (`rlmt.export.merge`), or as an adapter folder in PEFT's layout.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
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
from rlmt.export.card import Facts, hub_name, write_card
from rlmt.export.merge import adapted_layers, check_fits, merge, open_base
from rlmt.export.push import open_repository, upload
from rlmt.export.sharded import read_sharded_checkpoint
from rlmt.export.usage import Loading, policy_usage, reward_usage
from rlmt.formats.thinking import ThinkingFormat
from rlmt.models.adapters import CRITIC, PEFT_PREFIX, POLICY, is_adapter
from rlmt.models.assets import POLICY_ASSETS, REWARD_ASSETS, load_stop_token_ids, save_policy_assets, save_reward_assets
from rlmt.models.loading import load_config, load_tokenizer, meta_model
from rlmt.models.quantization import quantized_weights
from rlmt.options import check_writable
from rlmt.rewards.conversation import ConversationReader, set_pad_token
from rlmt.types import AdapterWeights

_ADAPTER_WEIGHT = re.compile(rf"(.+)\.lora_(A|B|magnitude_vector)\.{POLICY}\.weight")


@dataclass(frozen=True)
class _Kind:
    """Differences between the exports of a policy and of a reward model."""

    assets: str
    """Name of the folder next to the checkpoints."""
    prefix: str
    """Prefix of the weights' names in a checkpoint."""
    base: str
    """Key in the checkpoint's `rlmt` of the model that the run started from."""
    auto: Any
    """Auto class of transformers that loads the model."""


_POLICY = _Kind(POLICY_ASSETS, "policy.", "policy", AutoModelForCausalLM)
_REWARD = _Kind(REWARD_ASSETS, "model.", "model", AutoModelForSequenceClassification)


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint of `rlmt fit`."""

    path: Path
    kind: _Kind
    record: dict[str, Any]
    """The module's own data, stored under `rlmt`."""
    weights: dict[str, Tensor]
    """Weights by their names in the model."""
    config: dict[str, Any]
    """Configuration of the run as plain data; empty for runs from Python."""
    step: int | None
    """Last step of the run that the checkpoint has, as in metrics.csv."""

    @property
    def assets(self) -> Path:
        """Folder with the model's other files."""
        return self.path.parent / self.kind.assets

    @property
    def head(self) -> dict[str, Tensor]:
        """Weights trained in full next to an adapter: a reward model's head; a policy has none."""
        return {name: tensor for name, tensor in self.weights.items() if not is_adapter(name)}

    def save_assets(self, out: Path, config: PretrainedConfig) -> None:
        """Writes all files of the model's folder except the weights."""
        tokenizer = load_tokenizer(self.assets)
        if self.kind is _POLICY:
            format = ThinkingFormat.from_dict(self.record["format"])
            save_policy_assets(out, config, tokenizer, format, load_stop_token_ids(self.assets, tokenizer, format))
        else:
            set_pad_token(ConversationReader(tokenizer, str(self.assets)), config)
            save_reward_assets(out, config, tokenizer)


def export(
    ckpt: Path,
    out: Path,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    what: Literal["merged", "adapter"] = "merged",
    base: str | None = None,
    push: str | None = None,
    public: bool = False,
) -> None:
    """Exports a checkpoint to a Hugging Face folder: weights, config, tokenizer, chat template, format and model card.

    Args:
        ckpt: Checkpoint of a run, in the folder where the run wrote it: a file, or a sharded checkpoint folder.
        out: Folder to write; it must not exist or be empty.
        dtype: dtype of the exported weights; by default that of the trained weights, of the base to merge into, or of
            the adapter.
        what: Form in which a LoRA checkpoint is exported: `merged` full weights, which load like any model, or the
            `adapter` alone, for PEFT and vLLM's LoRA requests.
        base: Folder or hub name of the model that the adapter was trained on, if it has moved since the run.
        push: Repository on the Hugging Face hub, as USER/NAME, to upload the folder to; null uploads nothing.
        public: Whether everyone may read a repository that `push` creates; by default only you.

    Raises:
        UserError: As `write_export`, or the hub refuses the upload.
    """
    if push is None and public:
        raise UserError("--public true: nothing is uploaded; pass --push USER/NAME, too.")
    print(f"{out}: {write_export(ckpt, out, dtype, what, base, push, public)}")
    if push is not None:
        print(f"uploaded to {upload(out, push)}")


def write_export(
    ckpt: Path,
    out: Path,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    what: Literal["merged", "adapter"] = "merged",
    base: str | None = None,
    push: str | None = None,
    public: bool = False,
) -> str:
    """Exports a checkpoint as `export` does, without printing and without the upload.

    With `push` the repository is opened before anything is written, and the card has its name.

    Returns:
        Summary of the exported model.

    Raises:
        UserError: The checkpoint does not exist, is damaged or is none of rlmt, the files next to it are missing or do
            not match its weights, the base cannot be read, or `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists and is not empty; pass a new folder to export to.")
    check_writable(out.parent if out.exists() else out, "The export folder")
    if not ckpt.exists():
        raise UserError(f"{ckpt}: no such checkpoint; pass one that `rlmt fit` wrote.")
    checkpoint = _open(ckpt)
    has_adapter = checkpoint.record.get("adapter") is not None
    if not has_adapter and (what == "adapter" or base is not None):
        option = "--what adapter" if what == "adapter" else "--base"
        raise UserError(f"{ckpt}: stores full weights and no adapter; omit {option}.")
    torch_dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
    source = base or checkpoint.record[checkpoint.kind.base]
    if push is not None:
        _check_can_be_shared(source, has_adapter and what == "adapter")
        open_repository(push, public)
    with _atomic_folder(out) as folder:
        if has_adapter:
            write = _export_merged if what == "merged" else _export_adapter
            summary = write(checkpoint, source, folder, torch_dtype)
        else:
            summary = _export_full(checkpoint, folder, torch_dtype)
        adapter = has_adapter and what == "adapter"
        write_card(_card_facts(checkpoint, folder, push or out.resolve().name, source, adapter), folder)
        return "\n".join([summary, *_usage_notes(checkpoint)])


def _check_can_be_shared(source: str, adapter: bool) -> None:
    """Raises a UserError for an adapter of a local folder, which nobody else could load and whose path is private."""
    if adapter and hub_name(source) is None:
        raise UserError(
            f"--push: the adapter's model {source} is a local folder, which nobody else has; pass its hub name as "
            "--base, or export with --what merged."
        )


def _card_facts(checkpoint: _Checkpoint, folder: Path, name: str, source: str, adapter: bool) -> Facts:
    """What the model card of an exported folder states."""
    tokenizer, options = load_tokenizer(folder), checkpoint.config.get("data", {}).get("init_args", {})
    loading = Loading(
        name=name,
        base=(hub_name(source) or Path(source).name) if adapter else None,
        rank=(checkpoint.record.get("adapter") or {}).get("r", 0),
        temperature=options.get("temperature", Loading.temperature),
        max_new_tokens=options.get("max_new_tokens", Loading.max_new_tokens),
    )
    format: ThinkingFormat | None = None
    if checkpoint.kind is _POLICY:
        format = ThinkingFormat.from_dict(checkpoint.record["format"])
        usage = policy_usage(format, tokenizer, loading)
    else:
        usage = reward_usage(tokenizer, load_config(checkpoint.assets).get_text_config().pad_token_id, loading)
    return Facts(
        name=name.rpartition("/")[2],
        module=checkpoint.record.get("module", ""),
        base=source,
        config=checkpoint.config,
        usage=usage,
        format=format,
        adapter=adapter,
        run=checkpoint.path.parent.parent,
        step=checkpoint.step,
    )


def _usage_notes(checkpoint: _Checkpoint) -> list[str]:
    """What a user of an exported policy has to pass to its chat template to get the prompts that it was trained on."""
    if checkpoint.kind is not _POLICY:
        return []
    format = ThinkingFormat.from_dict(checkpoint.record["format"])
    if format.zero:
        return []
    template = format.template(load_tokenizer(checkpoint.assets))
    notes = []
    if template.arguments:
        notes.append(f"Render prompts with chat_template_kwargs {template.arguments}, as in training.")
    if template.prints_date():
        notes.append(f"The chat template prints a date: {format.date} in training and in rlmt chat, today elsewhere.")
    return notes


@contextmanager
def _atomic_folder(out: Path) -> Iterator[Path]:
    """Yields a folder next to `out` to write to, and renames it to `out` at the end.

    An interrupted export leaves nothing named `out`; the next export removes what it leaves next to it.
    """
    if out.is_dir():
        try:
            out.rmdir()
        except OSError as error:
            raise UserError(f"{out}: cannot be replaced ({error.strerror}); pass a new folder inside it.") from error
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open(path: Path) -> _Checkpoint:
    """Opens a checkpoint, and checks that the folder with the model's other files exists."""
    if path.is_dir():
        # Of the shards only the policy's weights are read, not the optimizer states.
        checkpoint = read_sharded_checkpoint(path, _POLICY.prefix)
    else:
        checkpoint = read_checkpoint(path, map_location="cpu", mmap=True)
    if not isinstance(checkpoint, dict) or "rlmt" not in checkpoint or "state_dict" not in checkpoint:
        raise UserError(f"{path}: is not a checkpoint of `rlmt fit`; pass one that is.")
    record = checkpoint["rlmt"]
    kind = _REWARD if record.get("module") == "RewardModeling" else _POLICY
    weights = {
        name.removeprefix(kind.prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(kind.prefix) and f".{CRITIC}." not in name
    }
    step = (checkpoint.get("run") or {}).get("step")
    opened = _Checkpoint(path, kind, record, weights, checkpoint.get("config") or {}, step)
    if not opened.assets.is_dir():
        raise UserError(f"{opened.assets}: not found; export the checkpoint from the folder where its run wrote it.")
    return opened


def _adapter(checkpoint: _Checkpoint) -> AdapterWeights:
    """The policy's or reward model's adapter under the names of PEFT's files, without a critic's."""
    tensors = {}
    for name, tensor in checkpoint.weights.items():
        if match := _ADAPTER_WEIGHT.fullmatch(name):
            layer, part = match.groups()
            # DoRA's magnitude is a module in memory; PEFT's files name it as the plain tensor that it used to be.
            suffix = "" if part == "magnitude_vector" else ".weight"
            tensors[f"{PEFT_PREFIX}{layer}.lora_{part}{suffix}"] = tensor
    if not tensors:
        raise UserError(f"{checkpoint.path}: the adapter that it records is missing; use an earlier checkpoint.")
    return AdapterWeights(checkpoint.record["adapter"], tensors)


def _export_full(checkpoint: _Checkpoint, out: Path, dtype: torch.dtype | None) -> str:
    model = _build_model(checkpoint, dtype)
    checkpoint.save_assets(out, model.config)
    if checkpoint.kind is _POLICY:
        model.generation_config = GenerationConfig.from_pretrained(out)
    model.save_pretrained(out)
    return f"{type(model).__name__}, {model.num_parameters():,} parameters in {model.dtype}"


def _export_merged(checkpoint: _Checkpoint, source: str, out: Path, dtype: torch.dtype | None) -> str:
    adapter, base = _adapter(checkpoint), open_base(source)
    check_fits(base, adapter)
    config, quantization = load_config(checkpoint.assets), checkpoint.record.get("quantization")
    training_dtype = cast(torch.dtype, config.dtype or torch.float32)
    layers = adapted_layers(adapter)
    config.dtype = dtype or base.tensors[f"{layers[0]}.weight"].dtype
    config.architectures = [type(meta_model(config, checkpoint.kind.auto)).__name__]
    checkpoint.save_assets(out, config)
    nf4: tuple[frozenset[str], bool] = (frozenset(), False)
    if quantization is not None:
        nf4 = quantized_weights(config, checkpoint.kind.auto), quantization["double_quant"]
    merge(base, adapter, out, training_dtype, dtype, *nf4, checkpoint.head)
    return f"{source} with the adapter of {len(layers)} layers merged into it, in {config.dtype}"


def _export_adapter(checkpoint: _Checkpoint, source: str, out: Path, dtype: torch.dtype | None) -> str:
    from peft import LoraConfig  # takes seconds, and an export of full weights does not use it

    adapter, head = _adapter(checkpoint), checkpoint.head
    folder = Path(source).expanduser()
    name = str(folder.resolve()) if folder.is_dir() else source  # a relative path would depend on the working directory
    tokenizer, config = load_tokenizer(checkpoint.assets), load_config(checkpoint.assets)
    options: dict[str, Any] = {"base_model_name_or_path": name, "inference_mode": True}
    if checkpoint.kind is _POLICY:
        ThinkingFormat.from_dict(checkpoint.record["format"]).save(out)
    else:
        set_pad_token(ConversationReader(tokenizer, str(checkpoint.assets)), config)
        options |= {"task_type": "SEQ_CLS", "modules_to_save": sorted({name.split(".")[0] for name in head})}
    tokenizer.save_pretrained(out)
    LoraConfig(**{**adapter.config, **options}).save_pretrained(str(out))
    trained = adapter.tensors | {PEFT_PREFIX + key: tensor for key, tensor in head.items()}
    tensors = {key: (t if dtype is None else t.to(dtype)).contiguous() for key, t in trained.items()}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    notes = [f"adapter of {len(adapted_layers(adapter))} layers for {name}"]
    if checkpoint.kind is _REWARD:
        pad = config.get_text_config().pad_token_id
        notes.append(f"Load its base as a sequence classifier with num_labels=1 and pad_token_id={pad}.")
    if checkpoint.record.get("quantization") is not None:
        notes.append("It was trained on this model in 4 bits (NF4): load the model in NF4, or export --what merged.")
    return "\n".join(notes)


def _build_model(checkpoint: _Checkpoint, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model that uses the checkpoint's tensors without a copy; no weight is initialized.

    Raises:
        UserError: The weights do not match the config next to the checkpoint.
    """
    weights, fix = checkpoint.weights, f"use the folder {checkpoint.kind.assets}/ that the same run wrote."
    if dtype is not None:
        weights = {name: t.to(dtype) if t.is_floating_point() else t for name, t in weights.items()}
    model = meta_model(load_config(checkpoint.assets), checkpoint.kind.auto)
    model.train(False)
    expected = model.state_dict()
    for name, tensor in weights.items():
        if name in expected and tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, but the config next to it requires {tuple(expected[name].shape)}"
            raise UserError(f"{checkpoint.path}: {name} has shape {shapes}; {fix}")
    loaded = model.load_state_dict(weights, strict=False, assign=True)
    # Tied again, tied weights are a single tensor, which is written once.
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise UserError(f"{checkpoint.path}: {missing[0]} is missing; {fix}")
    if loaded.unexpected_keys:
        raise UserError(f"{checkpoint.path}: {loaded.unexpected_keys[0]} is unknown to the config next to it; {fix}")
    return model
