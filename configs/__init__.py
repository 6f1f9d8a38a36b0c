"""The configs that are shipped with rlmt, and the names by which `--config` finds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlmt.errors import UserError


def resolve_configs(args: Sequence[str]) -> list[str]:
    """Replaces each `--config NAME` that is no file here by the shipped config of that name.

    `configs/grpo.yaml` and `grpo` both name the shipped configs/grpo.yaml, from any folder.

    Raises:
        UserError: neither a file here nor a shipped config.
    """
    resolved = []
    expecting = False
    for arg in args:
        if expecting:
            resolved.append(_find_config(arg))
        elif arg.startswith(("--config=", "-c=")):
            option, _, value = arg.partition("=")
            resolved.append(f"{option}={_find_config(value)}")
        else:
            resolved.append(arg)
        expecting = arg in ("--config", "-c") and not expecting
    return resolved


def _find_config(name: str) -> str:
    if Path(name).is_file():
        return name
    folder = Path(__file__).parent
    wanted = name.removeprefix("configs/").removesuffix(".yaml")
    shipped = {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}
    if wanted not in shipped:
        near = [found for found in shipped if Path(found).parent == Path(wanted).parent] or shipped
        raise UserError(f"--config {name}: no such file, and no shipped config of that name ({', '.join(near)}).")
    return str(shipped[wanted])
