"""Callbacks: they observe, draw, warn and save; none changes a gradient, and few log metrics (`metric_names`)."""

from .calibration import Calibration
from .compare_with_initial import CompareWithInitial
from .cot_length import CoTLength
from .evaluate import Evaluate
from .policy_checkpoint import PolicyCheckpoint
from .policy_health import PolicyHealth
from .progress_bar import StepProgressBar
from .report_writer import ReportWriter
from .reward_curves import RewardCurves
from .rollout_writer import RolloutWriter
from .run_record import RunRecord
from .run_state import RunState
from .run_summary import RunSummary
from .sample_table import SampleTable

__all__ = [
    "Calibration",
    "CoTLength",
    "CompareWithInitial",
    "Evaluate",
    "PolicyCheckpoint",
    "PolicyHealth",
    "ReportWriter",
    "RewardCurves",
    "RolloutWriter",
    "RunRecord",
    "RunState",
    "RunSummary",
    "SampleTable",
    "StepProgressBar",
]
