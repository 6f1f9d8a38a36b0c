"""`rlmt study`: runs many jobs from one file, over several seeds, and reports on them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from rlmt.cli.parsing import Parser
from rlmt.configs import resolve_configs
from rlmt.study.command import study

FLAGS = {
    "dry_run": "print the jobs that would run, and why, and run none",
    "report_only": "report on the jobs that are done, while others may still run, and run none",
}


def make_parser() -> Parser:
    """The parser of `rlmt study`."""
    parser = Parser(prog="rlmt study", description="Runs many jobs from one file, over seeds, and reports on them.")
    parser.add_argument("--config", action="config", help="study file or name, such as study/mini; later ones override")
    parser.add_function_arguments(study, skip={"command", *FLAGS})
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser


def run(args: Sequence[str]) -> int:
    """Parses the command line and its configs, and runs the study.

    Args:
        args: Arguments after `rlmt study`.

    Returns:
        Exit status: 0, or 130 when interrupted.

    Raises:
        UserError: The configuration is invalid, or jobs failed.
    """
    parser = make_parser()
    options = parser.instantiate_classes(parser.parse_args(resolve_configs(args))).as_dict()
    options.pop("config", None)
    try:
        study(**options, command=shlex.join(["rlmt", "study", *args]))
    except KeyboardInterrupt:
        print("rlmt: interrupted; the same command resumes the study", file=sys.stderr)
        return 130
    return 0
