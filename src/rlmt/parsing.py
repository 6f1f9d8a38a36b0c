"""jsonargparse with errors of one line."""

from __future__ import annotations

import re
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from rlmt.errors import UserError

_NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: |Errors:$|Expected a <class 'NoneType'>"
    r"|Given value type: |Given value: |Expected a path but .* not accessible or invalid|Expected a dot import path"
)


class Parser(LightningArgumentParser):
    """Raises UserError where jsonargparse would print its usage, a nested report, and exit."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # noqa: D102 - argparse's own
        raise UserError(one_line(message)) from ex

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def one_line(message: str) -> str:
    """jsonargparse's nested report as one line: the option's full name, and why it was refused.

    The report nests a level for each key and repeats the value at each; the names on the way make up the option, and the
    innermost reason is the one to show.
    """
    keys: list[str] = []
    owner = ""
    reasons: list[str] = []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ").strip()
        if key := re.match(r'Parser key "(.+?)":\s*(.*)', text):
            keys.append(key[1])
            text = key[2]
        if where := re.match(r"Problem with given class_path '(.+?)':\s*(.*)", text):
            owner, text = where[1], where[2]
        if text and not _NOISE.match(text):
            reasons.append(text)
    if not reasons:
        reasons = [" ".join(message.split())]
    option = "--" + ".".join(keys) + ": " if keys else ""
    reason = "; ".join(dict.fromkeys(reasons))
    if unknown := re.match(r"Option '(.+?)' is not accepted", reason):
        key = ".".join([*keys, unknown[1]])
        return f"--{key}: {owner or 'the command'} has no option {unknown[1]!r}; `--{'.'.join(keys)}.help {owner}` lists them."
    reason = reason.removeprefix("unrecognized arguments: ")
    if message.startswith("unrecognized arguments"):
        return f"{reason}: there is no such option; `--help` lists them."
    return option + reason
