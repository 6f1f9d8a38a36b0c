"""Language models: loading, adapters, quantization, log-probs, critic and reward model."""

from rlmt.models.adapters import LoRA
from rlmt.models.quantization import NF4

__all__ = ["NF4", "LoRA"]
