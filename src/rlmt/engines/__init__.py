"""Engines generate rollouts from the policy. Importing this package imports no vLLM."""

from rlmt.engines.base import Engine
from rlmt.engines.replay import ReplayEngine
from rlmt.engines.transformers import TransformersEngine
from rlmt.engines.vllm.engine import VLLMEngine
from rlmt.engines.vllm_server.engine import VLLMServerEngine

__all__ = ["Engine", "ReplayEngine", "TransformersEngine", "VLLMEngine", "VLLMServerEngine"]
