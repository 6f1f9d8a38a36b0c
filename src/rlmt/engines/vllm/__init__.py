"""Engine on vLLM in the trainer's process. Importing this package does not import vLLM."""

from rlmt.engines.vllm.engine import VLLMEngine

__all__ = ["VLLMEngine"]
