"""The `rlmt` command: one file a command, and what they share."""

from rlmt.cli.commands import main

__all__ = ["main"]
