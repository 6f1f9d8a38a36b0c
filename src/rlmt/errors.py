"""Exceptions for errors that the user can fix."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, reported in one line: the option or file, what is wrong, and the fix.

    The command line prints the message without a traceback and exits with status 2. Raise it before any model is loaded
    wherever the error can be found by then.
    """


class AllRanksUserError(UserError):
    """A `UserError` that every rank raises at the same point, so that collective operations still work afterwards.

    Args:
        message: The message, as for `UserError`.
        reported_elsewhere: Whether another rank prints the message, so that it is printed once.
    """

    def __init__(self, message: str, reported_elsewhere: bool) -> None:
        super().__init__(message)
        self.reported_elsewhere = reported_elsewhere


def first_line(error: Exception) -> str:
    """The first line of an exception's message without its full stop; the exception's type if there is no message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
