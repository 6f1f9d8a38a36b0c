"""Checkpoints: contents, atomic files, signals and timeouts. A resumed run equals one that was never interrupted."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlmt.checkpointing.csv_logger import ResumableCSVLogger
    from rlmt.checkpointing.files import AtomicCheckpointIO
    from rlmt.checkpointing.signals import StoppedBySignal
    from rlmt.checkpointing.snapshot import Snapshot

__all__ = ["AtomicCheckpointIO", "ResumableCSVLogger", "Snapshot", "StoppedBySignal"]

_MODULES = {
    "AtomicCheckpointIO": "files",
    "ResumableCSVLogger": "csv_logger",
    "Snapshot": "snapshot",
    "StoppedBySignal": "signals",
}


def __getattr__(name: str) -> Any:
    """Imports a class when it is asked for: every job of a study reads `provenance`, which needs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
