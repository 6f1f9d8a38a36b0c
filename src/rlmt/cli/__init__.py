"""The `rlmt` command line, one file a command."""

from rlmt.cli.commands import main

__all__ = ["main"]
