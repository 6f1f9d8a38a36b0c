"""The objectives, one a file."""

from rlmt.algorithms.base import Algorithm
from rlmt.algorithms.grpo import GRPO

__all__ = ["GRPO", "Algorithm"]
