"""Checks of Trainer, data and optimizer before any weights are loaded, and errors about them in one line."""

from __future__ import annotations

import os
import re
import traceback
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from rlmt.cli.messages import Report, missing_module, nearest
from rlmt.errors import UserError, first_line
from rlmt.modules.supervised import SupervisedModule

SERVICES = ("comet_ml", "mlflow", "wandb")
"""Packages of loggers, which raise errors of their own."""

_TRAINER_CURES = (
    (
        r"gpu backend|can ?not run on your system",
        "accelerator",
        "no such device was found; pass cpu, or check the driver",
    ),
    (r"enable_checkpointing", "enable_checkpointing", "must be true: the callbacks save checkpoints and stop a run"),
    (r"barebones", "barebones", "must be false: a run needs its logger and callbacks"),
    (r"number of devices|requested gpu", "devices", "there are not so many devices; lower the number"),
)
"""Pattern in a message of Lightning, the option it is about, and what to print in place of it."""

_REFUSED_CALLBACKS = {
    "GradientAccumulationScheduler": "each batch is a whole step; set --data.batch_size",
    "StochasticWeightAveraging": "rollouts come from the weights that are trained, not from an average; leave it out",
    "WeightAveraging": "rollouts come from the weights that are trained, not from an average; leave it out",
    "LearningRateFinder": "the modules take optimizer steps themselves; set --model.optimizer.lr",
    "BatchSizeFinder": "memory depends on --model.tokens_per_micro_batch; `rlmt plan` finds what fits",
}
"""Callback of Lightning that does not work with manual optimization → reason and fix."""


def check_manual_optimization(config: Any) -> None:
    """Checks the Trainer's options for a module with manual optimization; Lightning would raise an error of its own.

    Args:
        config: Options of the Trainer.

    Raises:
        UserError: An option or a callback controls optimizer steps, which the module takes itself, or changes weights.
    """
    if config.accumulate_grad_batches not in (None, 1):
        raise UserError(
            f"--trainer.accumulate_grad_batches is {config.accumulate_grad_batches}, but each batch is a whole step, "
            "split into micro-batches of --model.tokens_per_micro_batch; set --data.batch_size to the rows of a step."
        )
    if config.gradient_clip_val:
        raise UserError(
            f"--trainer.gradient_clip_val is {config.gradient_clip_val}, but the module clips gradients itself; set "
            "--model.max_grad_norm instead."
        )
    callbacks = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
    for callback in callbacks:
        for kind in type(callback).__mro__:
            if kind.__name__ in _REFUSED_CALLBACKS:
                raise UserError(f"--trainer.callbacks {type(callback).__name__}: {_REFUSED_CALLBACKS[kind.__name__]}.")


def check_folder(root: Path) -> None:
    """Checks that a run can write to its folder; it need not exist yet.

    Raises:
        UserError: It is a file, or the nearest existing folder above it is not writable.
    """
    existing = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--trainer.default_root_dir {root}: {existing} is a file; pass a folder.")
    if not os.access(existing, os.W_OK | os.X_OK) or existing.is_relative_to("/proc"):
        raise UserError(f"--trainer.default_root_dir {root}: {existing} is not writable; pass another folder.")


def check_data(model: Any, data: Any) -> None:
    """Checks that the data are those that the module trains on.

    Raises:
        UserError: They are not.
    """
    expected = getattr(model, "data_module", None)
    if expected is not None and expected not in [kind.__name__ for kind in type(data).__mro__]:
        raise UserError(
            f"--data is {type(data).__name__}, but --model {type(model).__name__} trains on {expected}; use the config "
            "sft or reward in place of base, or pass --data, too."
        )


def check_optimizer(model: Any) -> None:
    """Checks the optimizer's options on two small parameters, one of them in a layer, with names where a run has them.

    Raises:
        UserError: The optimizer refuses one, such as a negative learning rate.
    """
    factory = getattr(model, "optimizer_factory", None)
    if factory is None:
        return
    named = {name: nn.Parameter(torch.zeros(2, 2)) for name in ("embedding.weight", "layers.0.weight")}
    try:
        factory([{"params": list(named.items() if isinstance(model, SupervisedModule) else named.values())}])
    except (TypeError, ValueError) as error:
        raise UserError(f"--model.optimizer: {first_line(error)}; correct the option.") from error


def trainer_message(error: Exception) -> str:
    """The line for an error that Lightning raises about its own options."""
    text = " ".join(str(error).split())
    for pattern, option, cure in _TRAINER_CURES:
        if re.search(pattern, text, re.IGNORECASE):
            return f"--trainer.{option}: {cure}."
    if metric := re.search(r"conditioned on metric `(.+?)` which is not available.+following: (.+?)$", text):
        known = re.findall(r"`(.+?)`", metric[2])
        return f"EarlyStopping.monitor: no metric {metric[1]!r}.{nearest(metric[1], known)} Logged: {', '.join(known)}."
    parameters = signature(Trainer).parameters
    named = [word for word in re.findall(r"(?:`|Trainer\(|\.)(\w+)", text) if word in parameters]
    subject = f"--trainer.{named[0]}" if named else "--trainer"
    return f"{subject}: {text.rstrip('.')}."


def setup_message(error: Exception) -> str | None:
    """The line for an error while objects are created, if a user's environment explains it; else None."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(link, UserError) for link in chain):
        return None
    report = Report(str(error))
    subject = report.owner.rpartition(".")[2] or report.option
    frames = [frame.filename for link in chain for frame in traceback.extract_tb(link.__traceback__)]
    logger = any("/pytorch/loggers/" in file for file in frames)
    subject = f"--trainer.logger {subject}".rstrip("- ") if logger else subject
    missing = next((link for link in chain if isinstance(link, ModuleNotFoundError)), None)
    if missing is not None:
        package = missing.name or next(iter(re.findall(r"'([\w-]+)", str(missing))), "")
        return missing_module(subject, package)
    service = type(error).__module__.partition(".")[0]
    if service in SERVICES:
        return f"--trainer.logger: {service}: {first_line(error)}."
    return (
        f"{subject}: {first_line(Exception(str(chain[-1])))}."
        if logger and not isinstance(chain[-1], OSError)
        else None
    )
