"""jsonargparse with one-line errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import reduce
from inspect import signature
from operator import or_
from typing import Any, NoReturn, get_args

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from rlmt.cli.config_files import file_of
from rlmt.cli.messages import one_line
from rlmt.configs import resolve_configs
from rlmt.errors import UserError, own_error_message


class Parser(LightningArgumentParser):
    """Raises UserError where jsonargparse would print its usage and a nested report, and exit."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Reports an error in one line.

        Args:
            message: Report of jsonargparse.
            ex: Exception that the report is about.

        Raises:
            UserError: Always, except in parsers that jsonargparse creates internally; these report to their parent.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        own = own_error_message(ex)  # a file of the user's that cannot be imported
        raise UserError(own or one_line(message, option_names(self), file_of)) from ex


def option_names(parser: ArgumentParser, command: str | None = None) -> list[str]:
    """Names of a parser's options, such as `--trainer.max_steps`, and of those of its subcommands.

    Args:
        parser: The parser.
        command: The only subcommand to take options of; None takes all.
    """
    names = list(parser._option_string_actions)
    subcommands = parser._subcommands_action
    for name, inner in ({} if subcommands is None else subcommands._name_parser_map).items():
        names += inner._option_string_actions if command in (None, name) else []
    return names


def parse_integers_first(parser: ArgumentParser) -> None:
    """Lets options that take an integer or a float read `1` as the integer: one batch, where `1.0` is all of them.

    Python caches `Optional[Union[int, float]]` and `Optional[Union[float, int]]` as one type, in the order that was
    imported first, so Lightning's order does not hold.
    """
    for action in parser._actions:
        kinds = get_args(getattr(action, "_typehint", None))
        if int in kinds and float in kinds:
            others = [kind for kind in kinds if kind not in (int, float)]
            action._typehint = reduce(or_, others, int | float)  # type: ignore[attr-defined]


def function_parser(command: str, function: Callable[..., object], optional_positional: str | None = None) -> Parser:
    """A parser with a function's parameters as options; required parameters are positional arguments.

    Args:
        command: Name of the command after `rlmt`.
        function: Function with type hints and a Google-style docstring, which becomes the help text.
        optional_positional: Name of a parameter with a default that is a positional argument, too.
    """
    parser = Parser(prog=f"rlmt {command}", description=(function.__doc__ or "").split("\n")[0])
    skip: set[str | int] = set()
    if optional_positional is not None:
        parameter = signature(function, eval_str=True).parameters[optional_positional]
        parser.add_argument(
            optional_positional, nargs="?", type=parameter.annotation, default=parameter.default, help="folder to write"
        )
        skip = {optional_positional}
    parser.add_function_arguments(function, as_positional=True, skip=skip)
    return parser


def run_function(
    command: str, function: Callable[..., object], args: Sequence[str], optional_positional: str | None = None
) -> int:
    """Runs a function with its parameters as command-line options, as `function_parser` describes.

    Args:
        command: Name of the command after `rlmt`.
        function: The function.
        args: Command line after the command's name.
        optional_positional: Name of a parameter with a default that is a positional argument, too.

    Returns:
        Exit status 0.

    Raises:
        UserError: The arguments are invalid, or the function raises it.
    """
    parser = function_parser(command, function, optional_positional)
    function(**parser.instantiate_classes(parser.parse_args(list(args))).as_dict())
    return 0


def parse_options(parser: Parser, args: Sequence[str]) -> dict[str, Any]:
    """Parses the command line and its configs.

    Args:
        parser: Parser with an option `--config`.
        args: Arguments after the command's name.

    Returns:
        Options by name, classes instantiated, without `config`.

    Raises:
        UserError: An argument is invalid.
    """
    options: dict[str, Any] = parser.instantiate_classes(parser.parse_args(resolve_configs(args))).as_dict()
    options.pop("config", None)
    return options


def run_resumable(function: Callable[..., None], **options: Any) -> int:
    """Calls the function of a command that continues where it was interrupted.

    Args:
        function: The function.
        **options: Its arguments.

    Returns:
        Exit status: 0, or 130 when interrupted.
    """
    try:
        function(**options)
    except KeyboardInterrupt:
        print("rlmt: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0
