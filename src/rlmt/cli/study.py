"""`rlmt study`: many runs from one file, with seeds, and a report over them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from rlmt.cli.parsing import Parser
from rlmt.configs import resolve_configs
from rlmt.study.command import study


def run(args: Sequence[str]) -> int:
    """Reads the command line, with configs, and runs the study.

    Args:
        args: after `rlmt study`.

    Returns:
        Exit status: 0, or 130 when interrupted.

    Raises:
        UserError: a mistake in the configuration, or jobs failed.
    """
    parser = Parser(prog="rlmt study", description="Many runs from one file, with seeds, and a report over them.")
    parser.add_argument("--config", action="config", help="a study, such as study/mini; later ones win")
    parser.add_function_arguments(study, skip={"command"})
    options = parser.instantiate_classes(parser.parse_args(resolve_configs(args))).as_dict()
    options.pop("config", None)
    try:
        study(**options, command=shlex.join(["rlmt", "study", *args]))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 0
