"""vLLM servers in other processes, reached over HTTP."""

from rlmt.engines.vllm_server.engine import VLLMServerEngine

__all__ = ["VLLMServerEngine"]
