"""jsonargparse with one-line errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from inspect import signature
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from rlmt.errors import UserError

_NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: |Errors:$|Expected a <class 'NoneType'>"
    r"|Given value type: |Given value: |Expected a path but .* not accessible or invalid|Expected a dot import path"
)


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
        raise UserError(one_line(message)) from ex


def run_function(
    command: str, function: Callable[..., object], args: Sequence[str], optional_positional: str | None = None
) -> int:
    """Runs a function with its parameters as command-line options; required parameters are positional arguments.

    Args:
        command: Name of the command after `rlmt`.
        function: Function with type hints and a Google-style docstring, which becomes the help text.
        args: Command line after the command's name.
        optional_positional: Name of a parameter with a default that is a positional argument, too.

    Returns:
        Exit status 0.

    Raises:
        UserError: The arguments are invalid, or the function raises it.
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
    function(**parser.instantiate_classes(parser.parse_args(list(args))).as_dict())
    return 0


def one_line(message: str) -> str:
    """Converts jsonargparse's nested report to one line: the option's full name, and why its value is invalid.

    The report has a level for each key and repeats the value at each one. The keys on the way make up the option's
    name, and the innermost reason is the one to print.

    Args:
        message: Report of jsonargparse, of several lines.
    """
    keys: list[str] = []
    owner = ""
    reasons: list[str] = []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ").strip()
        if key := re.match(r'(?:Type .+ callable class: )?Parser key "(.+?)":\s*(.*)', text):
            keys.append(key[1])
            text = key[2]
        if class_path := re.match(r"Problem with given class_path '(.+?)':\s*(.*)", text):
            owner, text = class_path[1].rpartition(".")[2], class_path[2]
        if text and not _NOISE.match(text):
            reasons.append(text)
    option = "--" + ".".join(keys)
    reason = "; ".join(dict.fromkeys(reasons)) or " ".join(message.split())
    if unknown := re.match(r"Option '(.+?)' is not accepted", reason):
        return f"{option}.{unknown[1]}: {owner} has no option {unknown[1]!r}; `{option}.help {owner}` lists them."
    if out_of_range := re.search(r"Not of type \w+: (is .+?: must be .+?\.)(?=\. Got value|; |$)", reason):
        return f"{option} {out_of_range[1]}"
    if missing := re.match(r"the following arguments are required: (.+)", reason):
        return f"{option}.{missing[1]} is required; pass it, or a --config that sets it."
    if reason.startswith("unrecognized arguments: "):
        return f"{reason.removeprefix('unrecognized arguments: ')}: no such option; `--help` lists the options."
    return f"{option}: {reason}" if keys else reason
