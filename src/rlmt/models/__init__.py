"""Loading of language models and what is computed with them."""

from rlmt.models.adapters import LoRA
from rlmt.models.quantization import NF4

__all__ = ["NF4", "LoRA"]
