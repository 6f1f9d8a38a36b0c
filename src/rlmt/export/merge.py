"""Merges an adapter into its base, tensor by tensor from file to file, so that no model is ever in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
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
"""Largest file to write, unless a single tensor is larger; a merge takes the memory of about two."""

OUTPUT_PROJECTION = "lm_head.weight"
"""What a causal language model has and a classifier made of it has not."""

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def adapted_layers(adapter: AdapterWeights) -> list[str]:
    """Names of the layers that an adapter adapts."""
    end = ".lora_A.weight"
    return [name.removeprefix(PEFT_PREFIX).removesuffix(end) for name in adapter.tensors if name.endswith(end)]


@dataclass(frozen=True)
class Base:
    """The safetensors files of a model, opened anew for each tensor so that pages read before can go."""

    source: str
    """Folder or hub name, for messages."""
    files: dict[str, Path]
    """The file of each tensor, in the order of the files."""
    tensors: dict[str, Tensor] = field(repr=False)
    """Shape and number format of each tensor: on the meta device, without data."""

    def read(self, name: str) -> Tensor:
        """One tensor."""
        with safe_open(self.files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def open_base(source: str) -> Base:
    """Finds the weights of a model without reading them.

    Args:
        source: folder, or name on the hub; what is in the hub's cache is not downloaded again.

    Raises:
        UserError: they cannot be found, or a file of them is damaged.
    """
    folder = Path(source).expanduser()
    try:
        load_config(source)
        if not folder.is_dir():
            folder = Path(snapshot_download(source, allow_patterns=["*.json", "model*.safetensors"]))
    except (UserError, OSError) as error:
        raise UserError(
            f"{source}: the model that the adapter was trained on cannot be found (moved, or offline); name its folder "
            "with --base"
        ) from error
    if (folder / _INDEX).is_file():
        names = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        wanted = sorted({folder / file for file in names.values()})
    else:
        wanted = [folder / _WHOLE]
    if lacking := [path.name for path in wanted if not path.is_file()]:
        raise UserError(f"{source}: holds no {lacking[0]}; name a folder with all safetensors weights with --base")
    files, tensors = {}, {}
    for path in wanted:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    files[name] = path
                    tensors[name] = _meta(file.get_slice(name))
        except SafetensorError as error:
            raise UserError(f"{path}: is damaged ({error}); copy it again") from error
    return Base(source, files, tensors)


def _meta(part: Any) -> Tensor:
    """A tensor of the shape and number format of a safetensors slice, without reading it."""
    empty: Tensor = part[(slice(0, 0), ...)] if part.get_shape() else part[...]
    return torch.empty(part.get_shape(), dtype=empty.dtype, device="meta")


def check_fits(base: Base, adapter: AdapterWeights) -> None:
    """Checks that every adapted layer is in the base and has the adapter's shape.

    Raises:
        UserError: one is not, or the adapter is not whole.
    """
    for layer in adapted_layers(adapter):
        down, up = (adapter.tensors.get(f"{PEFT_PREFIX}{layer}.lora_{part}.weight") for part in "AB")
        weight = base.tensors.get(f"{layer}.weight")
        if weight is None:
            raise UserError(
                f"{base.source}: has no {layer}.weight for the adapter to be merged into (a tied head has "
                "none); name the adapter's model with --base, or export with --what adapter"
            )
        if up is None or down is None or tuple(weight.shape) != (up.shape[0], down.shape[1]):
            wanted = None if up is None or down is None else (up.shape[0], down.shape[1])
            raise UserError(
                f"{base.source}: {layer}.weight has shape {tuple(weight.shape)} and the adapter wants {wanted}; "
                "name the model that it was trained on with --base"
            )


def merge(
    base: Base,
    adapter: AdapterWeights,
    out: Path,
    held: torch.dtype,
    dtype: torch.dtype | None,
    quantized: Iterable[str] = (),
    double_quant: bool = False,
    head: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the base's weights with the adapter merged into them.

    Args:
        base: where the weights are.
        adapter: what was trained on them.
        out: folder to write to.
        held: number format that the trainer held the base in.
        dtype: of the weights written; None leaves each in the base's own.
        quantized: names of the weights that the trainer held in 4 bits.
        double_quant: whether their scales were quantised, too.
        head: weights trained in full, which take the place of the base's output projection.
    """
    heads = head or {}
    in_four_bits = frozenset(quantized)

    def made(name: str) -> Tensor:
        if name in heads:
            return heads[name] if dtype is None else heads[name].to(dtype)
        weight = base.read(name)
        if not weight.is_floating_point():
            return weight
        kept = weight.dtype if dtype is None else dtype
        weight = weight.to(held)
        if name in in_four_bits:
            weight = round_trip_nf4(weight, double_quant)
        return merge_adapter(name, weight, adapter).to(kept)

    kept = {name: t for name, t in base.tensors.items() if not (heads and name == OUTPUT_PROJECTION)}
    formats = {
        name: torch.empty_like(
            t, dtype=dtype if t.is_floating_point() and dtype is not None else t.dtype, device="meta"
        )
        for name, t in {**kept, **heads}.items()
    }
    _write(out, formats, made)


def _write(out: Path, formats: Mapping[str, Tensor], made: Callable[[str], Tensor]) -> None:
    """Writes a model's weights a file at a time, as transformers splits and names them.

    Args:
        out: folder to write to.
        formats: shape and number format of each tensor, on the meta device.
        made: gives a tensor by name.
    """
    split: Any = split_torch_state_dict_into_shards(dict(formats), max_shard_size=SHARD_BYTES)
    order = [(file, name) for file, names in split.filename_to_tensors.items() for name in names]
    parts: dict[str, Tensor] = {}
    for place, (file, name) in enumerate(track(order, "merging", transient=True)):
        parts[name] = made(name).contiguous()
        if place + 1 == len(order) or order[place + 1][0] != file:
            save_file(parts, out / file, metadata={"format": "pt"})
            parts.clear()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
