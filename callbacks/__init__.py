"""Callbacks: they observe and log, and never change a gradient."""

from .calibration import Calibration
from .cot_length import CoTLength
from .policy_checkpoint import PolicyCheckpoint
from .policy_health import PolicyHealth
from .reward_curves import RewardCurves
from .rollout_writer import RolloutWriter
from .sample_table import SampleTable
from .throughput import Throughput

__all__ = [
    "Calibration",
    "CoTLength",
    "PolicyCheckpoint",
    "PolicyHealth",
    "RewardCurves",
    "RolloutWriter",
    "SampleTable",
    "Throughput",
]
