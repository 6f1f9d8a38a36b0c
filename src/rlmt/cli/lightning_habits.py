"""What users of other Lightning applications type: options and variables that rlmt names otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rlmt.errors import UserError

_REPLACED = {"--optimizer": "--model.optimizer AdamW", "--lr_scheduler": "--model.scheduler CosineWithWarmup"}
"""Option of other applications → the one to use: modules take factories, since weights are loaded after parsing."""
_VARIABLE = re.compile(r"PL_(FIT|VALIDATE|TEST|PREDICT)__(.+)")
_DEFAULT_CLASSES = {"--model": "RLMTModule", "--data": "RolloutDataModule"}


def check_lightning_habits(args: Sequence[str], environment: Mapping[str, str]) -> None:
    """Checks that no option or environment variable is passed that rlmt would refuse without a cure, or not read.

    Args:
        args: Options of the command line.
        environment: Environment variables.

    Raises:
        UserError: There is one; the message names the option to use.
    """
    for arg in args:
        name = re.split(r"[.=]", arg.removeprefix("--"), maxsplit=1)[0]
        if arg.startswith("--") and (instead := _REPLACED.get(f"--{name}")):
            raise UserError(f"--{name}: no such option; use {instead} and its options, as `--config base` does.")
    for variable in environment:
        if found := _VARIABLE.fullmatch(variable):
            option = found[2].lower().replace("__", ".")
            raise UserError(f"{variable}: rlmt reads no options from the environment; unset it, and pass --{option}.")


def with_default_classes(args: Sequence[str]) -> list[str]:
    """Adds the usual module and data module for help on one of their options without a config.

    `rlmt fit --model.algorithm.help GRPO` would otherwise require `--model RLMTModule`.
    """
    if any(re.match(r"(--config|-c)(=|$)", arg) for arg in args):
        return list(args)
    added: list[str] = []
    for option, default in _DEFAULT_CLASSES.items():
        asks = any(re.match(rf"{option}\..+\.help$", arg.partition("=")[0]) for arg in args)
        if asks and option not in args:
            added += [option, default]
    return [*added, *args]
