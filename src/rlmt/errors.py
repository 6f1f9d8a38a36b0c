"""The exceptions for mistakes that a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, told in one line: what is wrong, where, and the cure.

    The command line prints the message alone, without a traceback, and exits with status 2. Raise it before any
    model is loaded wherever the mistake can be seen by then.
    """


class SharedError(UserError):
    """One that every rank of a run raises, at the same point: so they can still do together what ends a run.

    Args:
        message: as of any other.
        told: whether another rank prints it.
    """

    def __init__(self, message: str, told: bool) -> None:
        super().__init__(message)
        self.told = told
