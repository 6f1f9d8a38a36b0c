"""Exceptions for errors that the user can fix, and the lines of the user's own code that raised others."""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_LIBRARIES = [Path(__file__).parent, *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))]
"""Folders whose files are not the user's."""
_MOST_FRAMES = 3
"""Calls in a user's files that an error names, the innermost ones."""
_TRACEBACK = re.compile(r"(?:^|(?<=Original ))Traceback \(most recent call last\):\n", re.MULTILINE)
_FRAME = re.compile(r'^ +File "(.+)", line (\d+), in (\S+)(?:\n +(\S.*))?', re.MULTILINE)
_RAISED = re.compile(r"^(?:[\w.]*\.)?(\w+)(?:: (.*))?$", re.MULTILINE)


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


def first_line(error: BaseException) -> str:
    """The first line of an exception's message without its full stop; the exception's type if there is no message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


# The user's own code --------------------------------------------------------------------------------------------------


def own_error_message(error: BaseException | None) -> str | None:
    """The line for an error in a class, function or file of the user's that rlmt, or a library, called.

    Args:
        error: A caught exception; its causes count, too, since libraries raise errors of their own about those of
            constructors.

    Returns:
        `MyReward.load raised ValueError: message (my_rewards.py, line 3: code); fix it, and run the command again.`;
        None if no file of the user's took part.
    """
    chain = list(_chain(error))
    # A run that fails within its steps saves a checkpoint.
    codes = [[frame.f_code for frame, _ in traceback.walk_tb(link.__traceback__)] for link in chain]
    stepping = any(code.co_qualname == "_FitLoop.advance" for of_link in codes for code in of_link)
    again = "resume with --ckpt_path last" if stepping else "run the command again"
    for link, of_link in zip(chain, codes, strict=True):
        if (sent := _sent_error(link)) is not None and (own := [frame for frame in sent.frames if _is_own(frame[0])]):
            called = next((name for _, _, name, _ in own if not name.startswith("<")), "Your code")
            places = [_place(file, int(line), code) for file, line, _, code in reversed(own)]
            what = f"{sent.description} ({_listed(places)}) {sent.where}"
            return f"{called} raised {what}; fix it, and {again}."
        if isinstance(link, Exception) and (raised := describe_own_error(link)) is not None:
            names = [code.co_qualname for code in of_link if _is_own(code.co_filename)]
            called = next((name for name in names if name != "<module>"), "Your code")
            return f"{called} raised {raised}; fix it, and {again}."
    return None


def user_error_text(error: UserError) -> str:
    """The message of a `UserError`; without the traceback if another process raised it, such as a loader's worker."""
    sent = _sent_error(error)
    return str(error) if sent is None else sent.message


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
    lines = [_place(frame.filename, frame.lineno, frame.line) for frame in reversed(frames)]
    if isinstance(error, SyntaxError) and error.filename is not None and _is_own(error.filename):
        lines.insert(0, _place(error.filename, error.lineno, error.text))
    if not lines:
        return None
    response = _response_of(error, responses)
    named = "" if response is None else f" for the response {excerpt(response)}"
    return f"{type(error).__name__}: {first_line(error)} ({_listed(lines)}){named}"


def excerpt(value: object) -> str:
    """The `repr` of a value, on one line of at most 80 characters."""
    text = repr(value)
    return " ".join((text if len(text) <= 80 else text[:77] + "...").split())


def _place(file_name: str, line: int | None, code: str | None) -> str:
    """`my_rewards.py, line 3: code`, with the shorter of the relative and the absolute path."""
    return f"{min(os.path.relpath(file_name), file_name, key=len)}, line {line}: {(code or '').strip()}"


def _listed(places: Sequence[str]) -> str:
    """The innermost places of a call, innermost first; a comprehension has a frame of its own in its line."""
    return "; called in ".join(list(dict.fromkeys(places))[:_MOST_FRAMES])


class _SentError(NamedTuple):
    """An error of another process, which arrives as the text of its traceback."""

    kind: str
    message: str
    frames: list[tuple[str, str, str, str]]
    """File, line, function and code, outermost first."""
    where: str
    """Such as `in DataLoader worker process 0`."""

    @property
    def description(self) -> str:
        """`ValueError: message`, on one line."""
        lines = self.message.strip().splitlines()
        return f"{self.kind}: {lines[0].rstrip('.')}" if lines else self.kind


def _sent_error(error: BaseException) -> _SentError | None:
    """The error of another process that an exception's message holds; None if it holds no traceback.

    torch's data loaders raise an error of their worker's type with the traceback as its message, and multiprocessing
    and concurrent.futures put the traceback into a cause.
    """
    before, *tracebacks = _TRACEBACK.split(str(error))
    if not tracebacks:
        return None
    last = tracebacks[-1]  # of a chain the one that reached the other process's top
    frames = _FRAME.findall(last)
    raised = _RAISED.search(last)
    where = re.search(r"Caught \w+ (in .+?)\.\n", before)
    kind, message = (raised[1], raised[2] or "") if raised else (type(error).__name__, "")
    return _SentError(kind, message, frames, where[1] if where else "in another process")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _response_of(error: Exception, responses: Sequence[str]) -> str | None:
    """The response in a variable of the innermost own function that has one; the only response, if there is one."""
    known, found = set(responses), None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if _is_own(frame.f_code.co_filename):
            texts = (value for value in frame.f_locals.values() if isinstance(value, str) and value in known)
            found = next(texts, found)
    return responses[0] if found is None and len(responses) == 1 else found


def _is_own(file_name: str) -> bool:
    """Whether a file is neither of this package nor of an installed library, nor code without a file."""
    is_file = not file_name.startswith("<")  # such as <frozen importlib._bootstrap>
    return is_file and not any(Path(file_name).is_relative_to(folder) for folder in _LIBRARIES)
