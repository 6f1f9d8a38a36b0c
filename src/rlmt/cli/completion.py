"""`rlmt completion`: a script for bash or zsh that completes commands, options, values and names of shipped configs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from jsonargparse._actions import ActionConfigFile

from rlmt.cli import compare, configs, distill, report, runs, study, traits
from rlmt.cli.chat import chat
from rlmt.cli.commands import _COMMANDS
from rlmt.cli.lightning_cli import RLMTCLI, run
from rlmt.cli.parsing import function_parser
from rlmt.cli.plan import PlanCLI
from rlmt.configs import shipped_configs
from rlmt.demos.mini.files import make_mini
from rlmt.demos.tiny import make_tiny
from rlmt.export.checkpoints import export

SHELLS = ("bash", "zsh")
_COMPLETE_CONFIG = "_rlmt_complete_config"
_PREAMBLES = {
    "bash": _COMPLETE_CONFIG + """() { compgen -W 'NAMES' -- "$1"; compgen -f -- "$1"; }""",
    "zsh": _COMPLETE_CONFIG + "() { compadd -- NAMES; _files }",
}
"""Shell → function that completes the value of `--config`."""
_MODULE = re.compile(r"\b(?:rlmt|lightning|torch)\.(?:\w+\.)*(?=[A-Z])")
"""The module of a class, which options name without it."""


def completion(args: Sequence[str]) -> int:
    """Prints the script.

    Args:
        args: Arguments after `rlmt completion`.

    Returns:
        Exit status 0.
    """
    parser = argparse.ArgumentParser(
        prog="rlmt completion",
        description="Prints a script that completes commands, options and values. For bash: rlmt completion bash > "
        "~/.local/share/bash-completion/completions/rlmt; for zsh: rlmt completion zsh > a folder of $fpath/_rlmt.",
    )
    parser.add_argument("shell", choices=SHELLS)
    shell = parser.parse_args(list(args)).shell
    root = _root_parser()
    preamble = _PREAMBLES[shell].replace("NAMES", " ".join(shipped_configs()))
    script = root.get_completion_script(f"shtab-{shell}", preambles=[preamble])
    print(_MODULE.sub("", script))
    return 0


def _root_parser() -> ArgumentParser:
    """A parser with all commands as subcommands."""
    parsers: dict[str, ArgumentParser] = {
        **dict.fromkeys(("fit", "validate", "test", "predict"), _trainer_parser("fit", RLMTCLI)),  # the same options
        "plan": _trainer_parser("fit", PlanCLI),
        "configs": ArgumentParser(),
        "export": function_parser("export", export),
        "chat": function_parser("chat", chat),
        "compare": compare.make_parser(),
        "traits": traits.make_parser(),
        "distill": distill.make_parser(),
        "study": study.make_parser(),
        "mini": function_parser("mini", make_mini, "out"),
        "tiny": function_parser("tiny", make_tiny, "out"),
        "report": ArgumentParser(),
        "runs": ArgumentParser(),
        "completion": ArgumentParser(),
    }
    configs.add_arguments(parsers["configs"])
    report.add_arguments(parsers["report"])
    runs.add_arguments(parsers["runs"])
    parsers["completion"].add_argument("shell", choices=SHELLS)
    root = ArgumentParser(prog="rlmt")
    commands = root.add_subcommands()
    for name in _COMMANDS:
        parser = parsers.get(name) or ArgumentParser()  # others have no options
        parser.description = parser.description or f"rlmt {name}"  # shtab requires one for zsh
        for action in parser._actions:
            if isinstance(action, ActionConfigFile):
                action.complete = dict.fromkeys(SHELLS, _COMPLETE_CONFIG)  # type: ignore[attr-defined]
        commands.add_subcommand(name, parser)
    return root


class _Made(Exception):
    """The parser is there."""

    def __init__(self, parser: ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def _trainer_parser(command: str, cli: type[RLMTCLI]) -> ArgumentParser:
    """The parser of a Trainer command."""

    class ParserOnly(cli):  # type: ignore[valid-type, misc]
        """Stops where the command line would be parsed."""

        def parse_arguments(self, parser: Any, args: Any) -> NoReturn:
            """Raises the parser of the command."""
            raise _Made(self._subcommand_parsers[command])

    try:
        run([command], ParserOnly)
    except _Made as made:
        return made.parser
    raise AssertionError  # unreachable: the parser is always made
