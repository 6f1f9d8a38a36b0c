"""Loading of language models and what is computed with them."""

import logging

# On import it says that an optional kernel is not there, to users who may have asked for nothing of it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from rlmt.models.adapters import LoRA  # noqa: E402
from rlmt.models.quantization import NF4  # noqa: E402

__all__ = ["NF4", "LoRA"]
