"""Language models: loading, adapters, quantization, log-probs, critic and reward model."""

import logging

# Its import warns about a missing optional kernel, even if bitsandbytes is not used.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from rlmt.models.adapters import LoRA  # noqa: E402
from rlmt.models.quantization import NF4  # noqa: E402

__all__ = ["NF4", "LoRA"]
