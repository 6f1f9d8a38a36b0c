"""Frozen weights in 4 bits (QLoRA): bitsandbytes' NormalFloat."""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import torch
from torch import Tensor

from rlmt.annotations import PretrainedConfig
from rlmt.errors import UserError

BLOCK = 64
"""Number of weights that share a scale."""
_SCALES = 256
"""Number of scales that share a scale of their own with double quantization."""


class NF4:
    """4-bit NormalFloat for the linear layers of a frozen model (QLoRA, arXiv 2305.14314); needs bitsandbytes.

    Embeddings, norms and heads are not quantized. The layers compute in the dtype of the rest of the model.

    Args:
        double_quant: Whether the scales of the blocks of 64 weights are quantized too: 4.13 bits per weight instead of
            4.5.
    """

    def __init__(self, double_quant: bool = True) -> None:
        self.double_quant = double_quant

    def check(self) -> None:
        """Raises UserError if bitsandbytes is not installed."""
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("NF4 needs bitsandbytes, which is not installed: pip install bitsandbytes.")

    def loading_options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that quantize while loading, on torch's default device."""
        self.check()
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=self.double_quant
        )
        return {"quantization_config": config, "device_map": {"": torch.get_default_device()}}

    def finish_loading(self, model: Any) -> None:
        """Sets the compute dtype of a loaded model on every machine, and removes the quantization from its config."""
        from bitsandbytes.nn.modules import Linear4bit

        for layer in model.modules():
            if isinstance(layer, Linear4bit):
                layer.compute_dtype, layer.compute_type_is_set = model.dtype, True
                # On CPUs with bfloat16 instructions, bitsandbytes rewrites the weights in place at the first forward
                # pass in eval mode. From then on the layer computes in bfloat16 and has no gradient.
                layer.support_avx512bf16_for_cpu = False
        del model.config.quantization_config

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data."""
        return {"type": "nf4", "double_quant": self.double_quant}


def dequantize(weight: Tensor) -> Tensor:
    """The dequantized weight, with exactly the numbers its 4-bit layer computes with; any other weight as it is."""
    if type(weight).__name__ != "Params4bit":
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, cast(Any, weight).quant_state)


def unquantized_shape(weight: Tensor) -> torch.Size:
    """The shape of `dequantize(weight)`, without computing it."""
    shape: torch.Size = weight.shape if type(weight).__name__ != "Params4bit" else cast(Any, weight).quant_state.shape
    return shape


def quantized_weights(config: PretrainedConfig, auto: Any = None) -> frozenset[str]:
    """Names of the weights that transformers stores in 4 bits: those of linear layers, but not the head.

    Args:
        config: Config of the model; nothing else is read.
        auto: transformers' class that loads the model; None is `AutoModelForCausalLM`.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    NF4().check()
    from bitsandbytes.nn.modules import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    with torch.device("meta"):
        model = (auto or AutoModelForCausalLM).from_config(config)
    quantizer, options = cast(Any, Bnb4BitHfQuantizer), cast(Any, BitsAndBytesConfig)
    quantizer(options(load_in_4bit=True)).preprocess_model(model, device_map=None)
    return frozenset(f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, Linear4bit))


def round_trip_nf4(weight: Tensor, double_quant: bool) -> Tensor:
    """Quantizes a weight to NF4 and dequantizes it: the numbers that a 4-bit layer computes with.

    Args:
        weight: [out, in] weight.
        double_quant: Whether the scales are quantized too.

    Returns:
        [out, in] in the weight's dtype.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4"
    )
    back: Tensor = dequantize_4bit(packed, state)
    return back


def nf4_bytes(weights: int, double_quant: bool) -> int:
    """Computes the size of a quantized tensor: two weights per byte, the scales and two code books.

    Args:
        weights: Number of weights of the tensor.
        double_quant: Whether a scale takes one byte and a share of another scale, instead of four bytes.

    Returns:
        Size in bytes.
    """
    scales = -(-weights // BLOCK)
    total = -(-weights // 2) + 16 * 4
    if not double_quant:
        return total + 4 * scales
    return total + scales + 4 * -(-scales // _SCALES) + 256 * 4 + 4
