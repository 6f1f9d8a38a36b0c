"""`rlmt distill`: demonstrations from a teacher."""

from __future__ import annotations

from collections.abc import Sequence

from rlmt.cli.parsing import Parser, parse_options, run_resumable
from rlmt.distill import command


def make_parser() -> Parser:
    """The parser of `rlmt distill`."""
    parser = Parser(prog="rlmt distill", description=(command.distill.__doc__ or "").split("\n")[0])
    parser.add_argument("--config", action="config", help="YAML file or name, such as distill; later ones override")
    parser.add_function_arguments(command.distill, skip={"yes"})
    parser.add_argument("--yes", action="store_true", help="start without asking")
    return parser


def run(args: Sequence[str]) -> int:
    """Parses the command line and its configs, and asks the teacher.

    Args:
        args: Arguments after `rlmt distill`.

    Returns:
        Exit status: 0, or 130 when interrupted.

    Raises:
        UserError: The configuration is invalid, or the teacher failed.
    """
    return run_resumable(command.distill, **parse_options(make_parser(), args))
