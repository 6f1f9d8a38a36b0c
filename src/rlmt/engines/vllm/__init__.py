"""vLLM in the process of the trainer. Importing this package does not import vLLM."""

from rlmt.engines.vllm.engine import VLLMEngine

__all__ = ["VLLMEngine"]
