"""`rlmt evaluate`: benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from rlmt.cli.parsing import Parser, parse_options, run_resumable
from rlmt.errors import UserError
from rlmt.evaluation import command
from rlmt.evaluation.generation import GenerationSettings

STAGES: dict[command.Stage, str] = {
    "generate_only": "generate completions, and do not score them",
    "judge_only": "score the completions in the folder, on any machine",
    "table": "write the table of the results in the folder as Markdown, LaTeX and HTML",
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
    parser.add_function_arguments(command.evaluate, skip={"models", "generation", "stage", "yes"})
    parser.add_class_arguments(GenerationSettings)
    for name, text in STAGES.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--yes", action="store_true", help="start without asking about the cost")
    options = parse_options(parser, args)
    generation = GenerationSettings(**{field.name: options.pop(field.name) for field in fields(GenerationSettings)})
    stages = [name for name in STAGES if options.pop(name)]
    if len(stages) > 1:
        raise UserError(f"{' '.join(f'--{name}' for name in stages)}: these exclude each other; pass one of them.")
    return run_resumable(command.evaluate, **options, generation=generation, stage=stages[0] if stages else "all")
