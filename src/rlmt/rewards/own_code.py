"""Errors in a user's own rewards: the lines of the user's files that raised, without the frames of libraries."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path

from rlmt.errors import first_line

_LIBRARIES = [Path(__file__).parents[1], *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))]
"""Folders whose files are not the user's."""
_MOST_FRAMES = 3
"""Calls in a user's files that an error names, the innermost ones."""


def describe_own_error(error: Exception, responses: Sequence[str] = ()) -> str | None:
    """Type, message and places of an error in a user's files, on one line.

    Args:
        error: A caught exception.
        responses: Responses that were being scored. The one that a variable of the user's functions holds is named.

    Returns:
        `ValueError: message (my_rewards.py, line 3: code; called in my_rewards.py, line 9: code) for the response '…'`;
        None if no file of the user's took part.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]
    if not frames:
        return None
    lines = [f"{frame.filename}, line {frame.lineno}: {frame.line}" for frame in reversed(frames)]
    places = list(dict.fromkeys(lines))[:_MOST_FRAMES]  # a comprehension has a frame of its own in its line
    response = _response_of(error, responses)
    named = "" if response is None else f" for the response {excerpt(response)}"
    return f"{type(error).__name__}: {first_line(error)} ({'; called in '.join(places)}){named}"


def excerpt(value: object) -> str:
    """The `repr` of a value, on one line of at most 80 characters."""
    text = repr(value)
    return " ".join((text if len(text) <= 80 else text[:77] + "...").split())


def _response_of(error: Exception, responses: Sequence[str]) -> str | None:
    """The response in a variable of the innermost own function that has one; the only response, if there is one."""
    known, found = set(responses), None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if _is_own(frame.f_code.co_filename):
            texts = (value for value in frame.f_locals.values() if isinstance(value, str) and value in known)
            found = next(texts, found)
    return responses[0] if found is None and len(responses) == 1 else found


def _is_own(file_name: str) -> bool:
    """Whether a file is neither of this package nor of an installed library."""
    return not any(Path(file_name).is_relative_to(folder) for folder in _LIBRARIES)
