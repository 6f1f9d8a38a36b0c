"""What loading in 4 bits does to a model's weights: which it concerns, what becomes of one, how many bytes are left.

The loader is transformers', the arithmetic bitsandbytes' (NormalFloat of QLoRA, arXiv 2305.14314); both are asked here
without loading a model.
"""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig

from rlmt.errors import UserError

BLOCK = 64
"""Weights that share a scale."""
_SCALES = 256
"""Scales that share a scale of their own under double quantisation."""


def quantized_weights(config: PretrainedConfig, auto: Any = AutoModelForCausalLM) -> frozenset[str]:
    """Names of the weights that transformers holds in 4 bits: those of linear layers, but not of the head.

    Args:
        config: of the model; nothing else of it is read.
        auto: class that loads it.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("NF4 needs bitsandbytes, which is not installed: pip install 'rlmt[quantization]'.")
    from bitsandbytes.nn.modules import Linear4bit
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    with torch.device("meta"):
        model = auto.from_config(config)
    quantizer, options = cast(Any, Bnb4BitHfQuantizer), cast(Any, BitsAndBytesConfig)
    quantizer(options(load_in_4bit=True)).preprocess_model(model, device_map=None)
    return frozenset(f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, Linear4bit))


def quantized_and_back(weight: Tensor, double_quant: bool) -> Tensor:
    """The numbers that a 4-bit layer computes with: a weight quantised to NF4 and dequantised, in its own dtype.

    Args:
        weight: [out, in].
        double_quant: whether the scales are quantised, too.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4"
    )
    back: Tensor = dequantize_4bit(packed, state)
    return back


def nf4_bytes(weights: int, double_quant: bool) -> int:
    """Bytes of a quantised tensor: two weights a byte, its scales and its two code books.

    Args:
        weights: how many the tensor holds.
        double_quant: a scale takes one byte and a share of another scale, not four bytes.
    """
    scales = -(-weights // BLOCK)
    total = -(-weights // 2) + 16 * 4
    if not double_quant:
        return total + 4 * scales
    return total + scales + 4 * -(-scales // _SCALES) + 256 * 4 + 4
