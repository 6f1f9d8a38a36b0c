"""Engine on vLLM servers in other processes, over HTTP."""

from rlmt.engines.vllm_server.engine import VLLMServerEngine

__all__ = ["VLLMServerEngine"]
