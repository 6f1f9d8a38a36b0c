"""Errors in a user's own rewards: the line of the user's file that raised, without the frames of libraries."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

from rlmt.errors import first_line

_LIBRARIES = [Path(__file__).parents[1], *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))]
"""Folders whose files are not the user's."""


def describe_own_error(error: Exception) -> str | None:
    """Type, message and place of an error in a user's file, on one line.

    Args:
        error: A caught exception.

    Returns:
        `ValueError: message (file, line 3: code)`; None if no file of the user's took part.
    """
    frames = reversed(traceback.extract_tb(error.__traceback__))
    frame = next((frame for frame in frames if _is_own(frame.filename)), None)
    if frame is None:
        return None
    return f"{type(error).__name__}: {first_line(error)} ({frame.filename}, line {frame.lineno}: {frame.line})"


def _is_own(file_name: str) -> bool:
    """Whether a file is neither of this package nor of an installed library."""
    return not any(Path(file_name).is_relative_to(folder) for folder in _LIBRARIES)
