"""Merges an adapter into its base model tensor by tensor, from file to file, so that no full model is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlmt.errors import UserError
from rlmt.models.adapters import PEFT_PREFIX, merge_adapter
from rlmt.models.loading import load_config
from rlmt.models.quantization import round_trip_nf4
from rlmt.types import AdapterWeights

SHARD_BYTES = 2 * 2**30
"""Maximum size of a file, unless a single tensor is larger; a merge takes the memory of about two files."""

OUTPUT_PROJECTION = "lm_head.weight"
"""Weight of a causal language model that a classifier made from it does not have."""

_SINGLE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def adapted_layers(adapter: AdapterWeights) -> list[str]:
    """Names of the layers that an adapter adapts."""
    end = ".lora_A.weight"
    return [name.removeprefix(PEFT_PREFIX).removesuffix(end) for name in adapter.tensors if name.endswith(end)]


@dataclass(frozen=True)
class Base:
    """The safetensors files of a model; each read reopens its file, so that the pages read before can be freed."""

    source: str
    """Folder or hub name, for messages."""
    files: dict[str, Path]
    """The file of each tensor, in the order of the files."""
    tensors: dict[str, Tensor] = field(repr=False)
    """Each tensor on the meta device, with shape and dtype but no data."""

    def read(self, name: str) -> Tensor:
        """Reads one tensor."""
        with safe_open(self.files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def open_base(source: str) -> Base:
    """Finds the weights of a model without reading them.

    Args:
        source: Folder or hub name; files in the hub's cache are not downloaded again.

    Raises:
        UserError: The weights cannot be found, or a file is damaged.
    """
    folder = Path(source).expanduser()
    try:
        load_config(source)
        if not folder.is_dir():
            folder = Path(snapshot_download(source, allow_patterns=["*.json", "model*.safetensors"]))
    except (UserError, OSError) as error:
        raise UserError(
            f"{source}: the model that the adapter was trained on cannot be found (moved, or offline); pass its folder "
            "as --base."
        ) from error
    if (folder / _INDEX).is_file():
        weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        paths = sorted({folder / file for file in weight_map.values()})
    else:
        paths = [folder / _SINGLE_FILE]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise UserError(
            f"{source}: {missing[0]} is missing; pass a folder with all safetensors weights of the model as --base."
        )
    files, tensors = {}, {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    files[name] = path
                    tensors[name] = _meta_tensor(file.get_slice(name))
        except SafetensorError as error:
            raise UserError(f"{path}: the file is damaged ({error}); copy it again.") from error
    return Base(source, files, tensors)


def _meta_tensor(part: Any) -> Tensor:
    """A meta tensor with the shape and dtype of a safetensors slice, which is not read."""
    empty: Tensor = part[(slice(0, 0), ...)] if part.get_shape() else part[...]
    return torch.empty(part.get_shape(), dtype=empty.dtype, device="meta")


def check_fits(base: Base, adapter: AdapterWeights) -> None:
    """Checks that the base has every adapted layer, in the adapter's shape.

    Args:
        base: Model to merge into.
        adapter: Adapter to merge.

    Raises:
        UserError: A layer is missing or has another shape, or the adapter is incomplete.
    """
    for layer in adapted_layers(adapter):
        down, up = (adapter.tensors.get(f"{PEFT_PREFIX}{layer}.lora_{part}.weight") for part in "AB")
        weight = base.tensors.get(f"{layer}.weight")
        if weight is None:
            raise UserError(
                f"{base.source}: {layer}.weight, into which the adapter is merged, is missing (a tied output "
                "projection is not stored); pass the adapter's model as --base, or export with --what adapter."
            )
        if up is None or down is None or tuple(weight.shape) != (up.shape[0], down.shape[1]):
            required = None if up is None or down is None else (up.shape[0], down.shape[1])
            raise UserError(
                f"{base.source}: {layer}.weight has shape {tuple(weight.shape)}, but the adapter requires {required}; "
                "pass the model that it was trained on as --base."
            )


def merge(
    base: Base,
    adapter: AdapterWeights,
    out: Path,
    training_dtype: torch.dtype,
    dtype: torch.dtype | None,
    quantized: Iterable[str] = (),
    double_quant: bool = False,
    head: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the base's weights with the adapter merged into them.

    Args:
        base: Model to merge into.
        adapter: Adapter trained on that model.
        out: Folder to write to.
        training_dtype: dtype in which the trainer stored the base; the merge is computed in it.
        dtype: dtype of the written weights; None keeps that of each weight in the base.
        quantized: Names of the weights that the trainer stored in NF4.
        double_quant: Whether their scales were quantized, too.
        head: Weights trained in full, which replace the base's output projection.
    """
    heads = head or {}
    nf4 = frozenset(quantized)

    def compute(name: str) -> Tensor:
        if name in heads:
            return heads[name] if dtype is None else heads[name].to(dtype)
        weight = base.read(name)
        if not weight.is_floating_point():
            return weight
        out_dtype = weight.dtype if dtype is None else dtype
        weight = weight.to(training_dtype)
        if name in nf4:
            weight = round_trip_nf4(weight, double_quant)
        return merge_adapter(name, weight, adapter).to(out_dtype)

    kept = {name: t for name, t in base.tensors.items() if not (heads and name == OUTPUT_PROJECTION)}
    shapes = {
        name: torch.empty_like(
            t, dtype=dtype if t.is_floating_point() and dtype is not None else t.dtype, device="meta"
        )
        for name, t in {**kept, **heads}.items()
    }
    _write(out, shapes, compute)


def _write(out: Path, shapes: Mapping[str, Tensor], compute: Callable[[str], Tensor]) -> None:
    """Writes a model's weights file by file, split and named as transformers does.

    Args:
        out: Folder to write to.
        shapes: Each tensor on the meta device, with shape and dtype.
        compute: Computes a tensor by its name.
    """
    split: Any = split_torch_state_dict_into_shards(dict(shapes), max_shard_size=SHARD_BYTES)
    order = [(file, name) for file, names in split.filename_to_tensors.items() for name in names]
    tensors: dict[str, Tensor] = {}
    console = Console(stderr=True)  # stdout belongs to the command, such as the answer of `rlmt chat`
    bar = track(order, "merging", transient=True, console=console, disable=not console.is_terminal)
    for index, (file, name) in enumerate(bar):
        tensors[name] = compute(name).contiguous()
        if index + 1 == len(order) or order[index + 1][0] != file:
            save_file(tensors, out / file, metadata={"format": "pt"})
            tensors.clear()
    if split.is_sharded:
        weight_index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out / _INDEX).write_text(json.dumps(weight_index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
