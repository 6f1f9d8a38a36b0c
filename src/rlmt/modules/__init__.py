"""The LightningModules."""

from rlmt.modules.rlmt import RLMTModule

__all__ = ["RLMTModule"]
