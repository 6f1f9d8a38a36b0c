"""Checkpoints: what they hold, how they are written, and when. A killed run resumes as if it had not been killed."""

from rlmt.checkpointing.csv_logger import ResumableCSVLogger
from rlmt.checkpointing.files import AtomicCheckpointIO
from rlmt.checkpointing.signals import StoppedBySignal
from rlmt.checkpointing.snapshot import Snapshot

__all__ = ["AtomicCheckpointIO", "ResumableCSVLogger", "Snapshot", "StoppedBySignal"]
