"""Makes a module from a checkpoint, for use from Python without the run's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlmt.checkpointing.files import read_checkpoint
from rlmt.errors import UserError
from rlmt.formats.thinking import ThinkingFormat
from rlmt.modules.checkpoints import rlmt_state


def restore(cls: type[Any], path: Any, map_location: Any, options: dict[str, Any]) -> Any:
    """Makes the module of a checkpoint and loads its policy or reward model.

    Args:
        cls: Class of the module.
        path: The checkpoint.
        map_location: Device of the weights; None is the CPU.
        options: Options of the constructor that replace those stored in the checkpoint.

    Returns:
        The module, in eval mode.

    Raises:
        UserError: The file is not a checkpoint of this module, or options are missing or do not fit it.
    """
    checkpoint = read_checkpoint(Path(path), map_location="cpu", mmap=True)
    saved = rlmt_state(checkpoint, cls.kind)
    given = {cls.path_option: saved[cls.path_option]}
    if "format" in saved:
        given["format"] = ThinkingFormat.from_dict(saved["format"])
    stored = checkpoint.get("config", {}).get("model", {}).get("init_args")
    if stored is None:
        module = _construct(cls, path, given | options)
    else:
        module = _from_config(cls, {**stored, cls.path_option: saved[cls.path_option]}, options)
    module.check_checkpoint(checkpoint, False)
    module.load_initial(checkpoint["state_dict"])
    module.restored = True
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval().to(map_location or "cpu")


def _construct(cls: type[Any], path: Any, options: dict[str, Any]) -> Any:
    try:
        return cls(**options)
    except TypeError as error:
        raise UserError(
            f"{path}: the run was started from Python and stored no options ({error}); pass them to "
            "load_from_checkpoint, such as reward and algorithm."
        ) from error


def _from_config(cls: type[Any], stored: dict[str, Any], options: dict[str, Any]) -> Any:
    """Makes the module from the options that `rlmt fit` stored."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(cls, "model")
    name = f"{cls.__module__}.{cls.__qualname__}"
    config = {option: value for option, value in stored.items() if option not in options}
    parsed = parser.parse_object({"model": {"class_path": name, "init_args": config | options}})
    return parser.instantiate_classes(parsed).model
