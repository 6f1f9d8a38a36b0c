"""The `rlmt` command. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence

from rlmt import __version__
from rlmt.configs import resolve_configs
from rlmt.errors import AllRanksUserError, UserError

HELP = f"""rlmt {__version__}: train language models that think before they chat

usage: rlmt COMMAND [options]

  fit       train: rlmt fit --config base --config grpo --config tiny
  validate  reward and lengths on the held-out prompts
  test      the same, for prompts given by --data.val_prompts at the end of a project
  predict   samples and scores of every prompt, written to parquet
  plan      the memory that a run will take, before anything is loaded: rlmt plan --config … --memory 24
  export    turn a checkpoint into a Hugging Face folder: rlmt export CKPT OUT
  chat      talk to a checkpoint or an exported folder: rlmt chat CKPT_OR_FOLDER [--prompt TEXT]
  study     many runs from one file, with seeds, and a report over them: rlmt study --config study/mini
  mini      write a miniature world in which thinking pays, to train everything from scratch: rlmt mini [OUT]
  tiny      make small random models to try everything out on a laptop: rlmt tiny [OUT] [--corpus FILE]

Configs are composed, later ones win: --config takes a file or the name of a shipped one (base, grpo, no_think, …).
Every key of a config is an option, too: --model.format no_think --data.prompts my.jsonl --trainer.max_steps 20
`rlmt COMMAND --help` tells more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; the process's own by default.

    Returns:
        Exit status: 0, 2 for a mistake of the user's, 128 + the signal's number when one ended it (130 for Ctrl-C).
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if args[0] == "--version":
        print(__version__)
        return 0
    command, *rest = args
    try:
        run = _COMMANDS.get(command)
        if run is None:
            raise UserError(f"There is no command {command!r}; choose one of {', '.join(_COMMANDS)} (rlmt --help).")
        return run(command, rest)
    except KeyboardInterrupt:
        print("rlmt: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        mistake = _mistake_behind(error)
        if mistake is None:
            raise
        if not (isinstance(mistake, AllRanksUserError) and mistake.reported_elsewhere):
            print(f"rlmt: error: {mistake}", file=sys.stderr)
        return 2


def _mistake_behind(error: BaseException | None) -> UserError | None:
    """The UserError that an exception is or was caused by: jsonargparse wraps those of constructors in its own.

    A full disk is one, whatever did not fit.
    """
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f" for {error.filename}" if error.filename else ""
            return UserError(f"no room is left on the disk{what}: make some; a run goes on with --ckpt_path last.")
        error = error.__cause__ or error.__context__
    return error


def _lightning(command: str, args: list[str]) -> int:
    args = resolve_configs(args)
    from rlmt.cli.lightning_cli import run

    return run([command, *args])


def _plan(command: str, args: list[str]) -> int:
    args = resolve_configs(args)
    from rlmt.cli.plan import plan

    return plan(args)


def _export(command: str, args: list[str]) -> int:
    from rlmt.cli.parsing import run_function
    from rlmt.export.checkpoints import export

    return run_function(command, export, args)


def _chat(command: str, args: list[str]) -> int:
    from rlmt.cli.chat import chat
    from rlmt.cli.parsing import run_function

    return run_function(command, chat, args)


def _tiny(command: str, args: list[str]) -> int:
    from rlmt.cli.parsing import run_function
    from rlmt.demos.tiny import make_tiny

    return run_function(command, make_tiny, args, optional_positional="out")


def _mini(command: str, args: list[str]) -> int:
    from rlmt.cli.parsing import run_function
    from rlmt.demos.mini.files import make_mini

    return run_function(command, make_mini, args, optional_positional="out")


def _study(command: str, args: list[str]) -> int:
    from rlmt.cli.study import run

    return run(args)


_COMMANDS: dict[str, Callable[[str, list[str]], int]] = {
    **dict.fromkeys(("fit", "validate", "test", "predict"), _lightning),
    "plan": _plan,
    "export": _export,
    "chat": _chat,
    "mini": _mini,
    "study": _study,
    "tiny": _tiny,
}
