"""The configs shipped with rlmt, and the look-up of their names for `--config`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlmt.errors import UserError


def resolve_configs(args: Sequence[str]) -> list[str]:
    """Replaces each `--config NAME` that is not an existing file by the path of the shipped config with that name.

    Both `grpo` and `configs/grpo.yaml` name the shipped configs/grpo.yaml, from any folder.

    Args:
        args: Command-line arguments.

    Returns:
        The arguments with file paths as config names.

    Raises:
        UserError: There is neither a file nor a shipped config with that name.
    """
    resolved = []
    expecting = False
    for arg in args:
        if expecting:
            resolved.append(find_config(arg))
        elif arg.startswith(("--config=", "-c=")):
            option, _, value = arg.partition("=")
            resolved.append(f"{option}={find_config(value)}")
        else:
            resolved.append(arg)
        expecting = arg in ("--config", "-c") and not expecting
    return resolved


def shipped_configs() -> dict[str, Path]:
    """Name of each shipped config → its file."""
    folder = Path(__file__).parent
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def find_config(name: str) -> str:
    """The path of a config file or of a shipped config.

    Raises:
        UserError: There is neither a file nor a shipped config with that name.
    """
    if Path(name).is_file():
        return name
    key, shipped = name.removeprefix("configs/").removesuffix(".yaml"), shipped_configs()
    if key not in shipped:
        choices = [other for other in shipped if Path(other).parent == Path(key).parent] or shipped
        raise UserError(
            f"--config {name}: no such file and no shipped config of that name; choose from {', '.join(choices)}."
        )
    return str(shipped[key])
