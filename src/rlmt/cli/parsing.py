"""jsonargparse with errors of one line."""

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
    """Raises UserError where jsonargparse would print its usage, a nested report, and exit."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Tells of a mistake in one line.

        Raises:
            UserError: always, but in the parsers that jsonargparse makes on its way: those report to their parent.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        raise UserError(one_line(message)) from ex


def run_function(
    command: str, function: Callable[..., object], args: Sequence[str], optional_positional: str | None = None
) -> int:
    """Runs a function whose command-line options are its arguments, required ones by position.

    Args:
        command: its name after `rlmt`.
        function: with type hints and a Google-style docstring, from which the help is made.
        args: the command line after the command's name.
        optional_positional: an argument with a default that is given by position, too.

    Returns:
        Exit status 0.

    Raises:
        UserError: bad arguments, or whatever the function raises.
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
    """Jsonargparse's nested report as one line: the option's full name, and why it was refused.

    The report nests a level for each key and repeats the value at each; the names on the way make up the option, and
    the innermost reason is the one to show.
    """
    keys: list[str] = []
    owner = ""
    reasons: list[str] = []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ").strip()
        if key := re.match(r'(?:Type .+ callable class: )?Parser key "(.+?)":\s*(.*)', text):
            keys.append(key[1])
            text = key[2]
        if where := re.match(r"Problem with given class_path '(.+?)':\s*(.*)", text):
            owner, text = where[1].rpartition(".")[2], where[2]
        if text and not _NOISE.match(text):
            reasons.append(text)
    option = "--" + ".".join(keys)
    reason = "; ".join(dict.fromkeys(reasons)) or " ".join(message.split())
    if unknown := re.match(r"Option '(.+?)' is not accepted", reason):
        return f"{option}.{unknown[1]}: {owner} has no option {unknown[1]!r}; `{option}.help {owner}` lists them."
    if out_of_range := re.search(r"Not of type \w+: (is .+?: must be .+?\.)(?=\. Got value|; |$)", reason):
        return f"{option} {out_of_range[1]}"
    if missing := re.match(r"the following arguments are required: (.+)", reason):
        return f"{option}.{missing[1]} is missing; give it, or a --config that has it."
    if reason.startswith("unrecognized arguments: "):
        return f"{reason.removeprefix('unrecognized arguments: ')}: there is no such option; `--help` lists them."
    return f"{option}: {reason}" if keys else reason
