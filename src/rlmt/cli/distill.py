"""`rlmt distill`: demonstrations from a teacher."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlmt.cli.parsing import Parser
from rlmt.configs import resolve_configs
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
    parser = make_parser()
    options = parser.instantiate_classes(parser.parse_args(resolve_configs(args))).as_dict()
    options.pop("config", None)
    try:
        command.distill(**options)
    except KeyboardInterrupt:
        print("rlmt: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0
