"""Callbacks: they observe, draw, warn and save; they never change a gradient, and only `Evaluate` logs metrics."""

from .calibration import Calibration
from .cot_length import CoTLength
from .evaluate import Evaluate
from .policy_checkpoint import PolicyCheckpoint
from .policy_health import PolicyHealth
from .progress_bar import StepProgressBar
from .reward_curves import RewardCurves
from .rollout_writer import RolloutWriter
from .run_state import RunState
from .run_summary import RunSummary
from .sample_table import SampleTable

__all__ = [
    "Calibration",
    "CoTLength",
    "Evaluate",
    "PolicyCheckpoint",
    "PolicyHealth",
    "RewardCurves",
    "RolloutWriter",
    "RunState",
    "RunSummary",
    "SampleTable",
    "StepProgressBar",
]
