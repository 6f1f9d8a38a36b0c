"""`rlmt traits`: in which planning traits the thoughts of two policies differ."""

from __future__ import annotations

from collections.abc import Sequence

from rlmt.cli.parsing import Parser, parse_options, run_resumable
from rlmt.evaluation.traits import command


def make_parser() -> Parser:
    """The command's parser."""
    parser = Parser(prog="rlmt traits", description=(command.traits.__doc__ or "").split("\n")[0])
    parser.add_argument("--config", action="config", help="YAML file or name, such as traits; later ones override")
    parser.add_argument(
        "a", help="checkpoint, exported folder, Hub name, or YAML file of an endpoint; NAME=MODEL names it"
    )
    parser.add_argument("b", help="the policy to compare with")
    parser.add_function_arguments(command.traits, skip={"a", "b", "yes"})
    parser.add_argument("--yes", action="store_true", help="ask endpoints without a question about the cost")
    return parser


def run(args: Sequence[str]) -> int:
    """Parses the command line and its configs, and analyses the thoughts of two policies.

    Args:
        args: Arguments after `rlmt traits`.

    Returns:
        Exit status: 0, or 130 when interrupted.

    Raises:
        UserError: The configuration is invalid, a model does not think or cannot be read, or the judge failed.
    """
    return run_resumable(command.traits, **parse_options(make_parser(), args))
