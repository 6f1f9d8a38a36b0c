"""Checkpoints: contents, atomic files, signals and timeouts. A resumed run equals one that was never interrupted."""

from rlmt.checkpointing.csv_logger import ResumableCSVLogger
from rlmt.checkpointing.files import AtomicCheckpointIO
from rlmt.checkpointing.signals import StoppedBySignal
from rlmt.checkpointing.snapshot import Snapshot

__all__ = ["AtomicCheckpointIO", "ResumableCSVLogger", "Snapshot", "StoppedBySignal"]
