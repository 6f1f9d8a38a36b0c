"""`rlmt evaluate`: benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlmt.cli.parsing import Parser
from rlmt.configs import resolve_configs
from rlmt.evaluation import command

FLAGS = {
    "generate_only": "generate completions, and do not score them",
    "judge_only": "score the completions in the folder, on any machine",
    "table": "write the table of the results in the folder as Markdown, LaTeX and HTML",
    "yes": "start without asking about the cost",
}


def run(args: Sequence[str]) -> int:
    """Parses the command line and its configs, and evaluates.

    Args:
        args: Arguments after `rlmt evaluate`.

    Returns:
        Exit status: 0, or 130 when interrupted.

    Raises:
        UserError: The configuration is invalid, or the evaluation fails.
    """
    parser = Parser(prog="rlmt evaluate", description=(command.evaluate.__doc__ or "").split("\n")[0])
    parser.add_argument("--config", action="config", help="YAML file or name, such as evaluate; later ones override")
    parser.add_argument("models", nargs="*", help="checkpoints, folders, hub names or YAML files of endpoints")
    parser.add_function_arguments(command.evaluate, skip={"models", *FLAGS})
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    options = parser.instantiate_classes(parser.parse_args(resolve_configs(args))).as_dict()
    options.pop("config", None)
    try:
        command.evaluate(**options)
    except KeyboardInterrupt:
        print("rlmt: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0
