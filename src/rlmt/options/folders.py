"""Check of folders that a command writes to, before it does any work."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rlmt.errors import UserError


def check_writable(folder: Path, subject: str, fix: str = "pass a folder that can be written") -> None:
    """Checks that a folder can be written to, or created, by writing beside what exists of it; nothing remains.

    Args:
        folder: Folder that will be written to.
        subject: The option or command that names it, for the message.
        fix: What to do about it, for the message.

    Raises:
        UserError: A part of the path is a file, or nothing can be written there.
    """
    try:
        existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not existing.is_dir():
            raise UserError(f"{subject} {folder}: {existing} is not a folder; {fix}.")
        with tempfile.TemporaryDirectory(prefix=".rlmt-", dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{subject} {folder}: cannot be written ({error.strerror or error}); {fix}.") from error
