"""The `rlmt` command: a table of its subcommands.

Each subcommand imports its dependencies when it runs, so that `rlmt --help` answers at once.
"""

from __future__ import annotations

import errno
import gc
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rlmt import __version__, progress
from rlmt.cli.quiet import silence_third_party
from rlmt.configs import resolve_configs
from rlmt.errors import AllRanksUserError, UserError, own_error_message, user_error_text

HELP = f"""rlmt {__version__}: train language models that think before they chat

usage: rlmt COMMAND [options]

  fit        train a model: rlmt fit --config base --config grpo --config tiny
  validate   compute reward and lengths on the validation prompts
  test       the same for a final test set, passed as --data.val_prompts
  predict    generate and score samples for every prompt, and write them to parquet
  plan       print the memory a run takes, before any weights are loaded: rlmt plan --config … --memory 24
  configs    list the shipped configs; print or copy one: rlmt configs [show NAME …] [copy NAME FILE]
  runs       list the training runs in a folder with state, step, reward and verdict: rlmt runs [FOLDER] [--watch]
  doctor     print what this machine has, what is missing, and which shipped configs would run on it
  export     convert a checkpoint to a Hugging Face folder: rlmt export CKPT OUT
  chat       chat with a checkpoint or an exported folder: rlmt chat CKPT_OR_FOLDER [--prompt TEXT]
  compare    find out which of two policies answers your prompts better: rlmt compare A B --prompts FILE --out DIR
  traits     find out how the thoughts of two policies differ: rlmt traits A B --config traits --prompts FILE --out DIR
  distill    ask a teacher for demonstrations: rlmt distill --config distill --prompts FILE --out FILE
  evaluate   score models on benchmarks: rlmt evaluate NAME=MODEL NAME=MODEL --config evaluate --out results
  report     write one HTML page on a run, or on several: rlmt report RUN [RUN …] [--out FILE]
  study      run many runs from one file, with seeds, and report on them: rlmt study --config study/mini
  mini       write data for a miniature task that rewards thinking, to train everything from scratch: rlmt mini [OUT]
  tiny       write small random models, to try everything on a laptop: rlmt tiny [OUT] [--corpus FILE]
  completion print a script for tab completion: rlmt completion bash, or zsh

Configs compose and later ones take precedence: --config takes a file or the name of a shipped config (base, grpo, …).
Every config key is also an option: --model.format no_think --data.prompts my.jsonl --trainer.max_steps 20
`rlmt COMMAND --help` prints the options of a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0 on success, 2 after a user error, 128 + the signal's number after a signal (130 for Ctrl-C).
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if args[0] == "--version":
        print(__version__)
        return 0
    command, *rest = args
    silence_third_party()
    _escape_what_cannot_be_encoded()
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)  # a user's own classes; at the end, so that no file there hides a package
    try:
        run = _COMMANDS.get(command)
        if run is None:
            raise UserError(f"{command!r} is not a command; choose one of {', '.join(_COMMANDS)} (rlmt --help).")
        return run(command, rest)
    except KeyboardInterrupt:
        print("rlmt: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        user_error = _user_error_from(error)
        if user_error is None:
            raise
        if not (isinstance(user_error, AllRanksUserError) and user_error.reported_elsewhere):
            print(f"rlmt: error: {user_error_text(user_error)}", file=sys.stderr)
        return 2


def _escape_what_cannot_be_encoded() -> None:
    """Prints characters outside the encoding of a terminal or pipe as escapes, in place of a UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _user_error_from(error: Exception) -> UserError | None:
    """The UserError in the chain of an exception's causes; jsonargparse wraps errors of constructors in its own.

    A full disk counts as a user error, whichever file it concerns, and so do an option that Lightning refuses and an
    exception in the user's own code.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        refused = type(cause).__name__ == "MisconfigurationException" or "Early stopping conditioned on" in str(cause)
        if isinstance(cause, Exception) and refused:
            from rlmt.cli.checks import trainer_message

            return UserError(trainer_message(cause))
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            subject = f"{cause.filename}: the" if cause.filename else "The"
            return UserError(f"{subject} disk is full; free some space, then resume the run with --ckpt_path last.")
        cause = cause.__cause__ or cause.__context__
    if cause is None and (message := own_error_message(error)) is not None:
        return UserError(message)
    return cause


@contextmanager
def _starting() -> Iterator[None]:
    """Shows on a terminal that a command starts while it imports its libraries, which takes seconds.

    What only some runs use is deferred, and garbage collection paused: imports create some million objects that stay.
    """
    from rlmt.cli.deferred_imports import defer_torchmetrics

    gc.disable()
    try:
        with progress.busy("starting …"):
            defer_torchmetrics()
            yield
    finally:
        gc.enable()


def _checked(args: list[str]) -> list[str]:
    """The arguments with file paths as config names, after the checks that need neither torch nor Lightning.

    Importing these takes seconds, so errors of config files are reported before.
    """
    from rlmt.cli.config_files import ConfigFiles
    from rlmt.cli.lightning_habits import check_lightning_habits

    args = resolve_configs(args)
    check_lightning_habits(args, os.environ)
    ConfigFiles(args).check_classes()
    return args


def _lightning(command: str, args: list[str]) -> int:
    args = _checked(args)
    with _starting():
        from rlmt.cli.lightning_cli import run

    return run([command, *args])


def _plan(command: str, args: list[str]) -> int:
    args = _checked(args)
    with _starting():
        from rlmt.cli.plan import plan

    return plan(args)


def _export(command: str, args: list[str]) -> int:
    with _starting():
        from rlmt.cli.parsing import run_function
        from rlmt.export.checkpoints import export

    return run_function(command, export, args)


def _chat(command: str, args: list[str]) -> int:
    with _starting():
        from rlmt.cli.chat import chat
        from rlmt.cli.parsing import run_function

    return run_function(command, chat, args)


def _tiny(command: str, args: list[str]) -> int:
    with _starting():
        from rlmt.cli.parsing import run_function
        from rlmt.demos.tiny import make_tiny

    return run_function(command, make_tiny, args, optional_positional="out")


def _mini(command: str, args: list[str]) -> int:
    with _starting():
        from rlmt.cli.parsing import run_function
        from rlmt.demos.mini.files import make_mini

    return run_function(command, make_mini, args, optional_positional="out")


def _compare(command: str, args: list[str]) -> int:
    with _starting():
        from rlmt.cli.compare import run

    return run(args)


def _traits(command: str, args: list[str]) -> int:
    with _starting():
        from rlmt.cli.traits import run

    return run(args)


def _distill(command: str, args: list[str]) -> int:
    with _starting():
        from rlmt.cli.distill import run

    return run(args)


def _evaluate(command: str, args: list[str]) -> int:
    with _starting():
        from rlmt.cli.evaluate import run

    return run(args)


def _study(command: str, args: list[str]) -> int:
    with _starting():
        from rlmt.cli.study import run

    return run(args)


def _report(command: str, args: list[str]) -> int:
    from rlmt.cli.report import run

    return run(args)


def _configs(command: str, args: list[str]) -> int:
    from rlmt.cli.configs import run

    return run(args)


def _runs(command: str, args: list[str]) -> int:
    from rlmt.cli.runs import run

    return run(args)


def _completion(command: str, args: list[str]) -> int:
    with _starting():
        from rlmt.cli.completion import completion

    return completion(args)


def _doctor(command: str, args: list[str]) -> int:
    import argparse

    from rlmt.cli.doctor import doctor

    description = "Prints what this machine has, what is missing with its cure, and which shipped configs would run."
    argparse.ArgumentParser(prog="rlmt doctor", description=description).parse_args(args)
    return doctor()


_COMMANDS: dict[str, Callable[[str, list[str]], int]] = {
    **dict.fromkeys(("fit", "validate", "test", "predict"), _lightning),
    "plan": _plan,
    "configs": _configs,
    "runs": _runs,
    "doctor": _doctor,
    "export": _export,
    "chat": _chat,
    "completion": _completion,
    "compare": _compare,
    "traits": _traits,
    "distill": _distill,
    "evaluate": _evaluate,
    "mini": _mini,
    "report": _report,
    "study": _study,
    "tiny": _tiny,
}
