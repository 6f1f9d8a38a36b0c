"""`rlmt configs`: lists the shipped configs, prints one or a composition, and copies one to edit."""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from rlmt.configs import find_config, shipped_configs
from rlmt.errors import UserError


def run(args: Sequence[str]) -> int:
    """Runs `rlmt configs`, `rlmt configs copy NAME [FILE]` or `rlmt configs show NAME …`.

    Args:
        args: Arguments after `rlmt configs`.

    Returns:
        Exit status 0.

    Raises:
        UserError: There is no config of that name, or the file to write exists.
    """
    # The standard library's parser: jsonargparse takes seconds to import.
    parser = argparse.ArgumentParser(
        prog="rlmt configs", description="Lists the shipped configs; prints or copies one."
    )
    add_arguments(parser)
    options = parser.parse_args(list(args))
    match options.action, options.names:
        case "list", []:
            _list()
        case "show", [_, *_]:
            return _show(options.names)
        case "copy", [name]:
            _copy(name, Path(Path(name).name).with_suffix(".yaml"))
        case "copy", [name, file]:
            _copy(name, Path(file))
        case _:
            raise UserError("rlmt configs: use it alone, or as `show NAME …`, or as `copy NAME [FILE]`.")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `rlmt configs`."""
    parser.add_argument("action", nargs="?", choices=["list", "show", "copy"], default="list")
    parser.add_argument("names", nargs="*", help="show: names or files, composed; copy: a name, and the file to write")


def purpose(path: Path) -> str:
    """The first sentence of the comment at the head of a config."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = " ".join(line.removeprefix("#").strip() for line in itertools.takewhile(lambda line: line[:1] == "#", lines))
    return re.split(r"(?<=[.])\s(?=[A-Z`])|:? rlmt ", head, maxsplit=1)[0]


def _list() -> None:
    """Prints a line for each config; those of the paper's runs are counted, since their names say all."""
    shipped = shipped_configs()
    shown = {name: path for name, path in shipped.items() if not name.startswith("paper/")}
    width, columns = max(map(len, shown)) + 2, shutil.get_terminal_size((120, 24)).columns
    for name, path in sorted(shown.items(), key=lambda item: (item[0].count("/"), item[0])):
        line = f"{name:<{width}}{purpose(path)}"
        print(line if len(line) <= columns else line[: columns - 1] + "…")
    paper = [name for name in shipped if name.startswith("paper/")]
    print(f"{'paper/…':<{width}}The {len(paper)} runs of the paper, such as {paper[0]}.")


def _show(names: Sequence[str]) -> int:
    """Prints one config as it is, with its comments, or the composition of several with every option of the run."""
    paths = [find_config(name) for name in names]
    if len(paths) == 1:
        print(Path(paths[0]).read_text(encoding="utf-8"), end="")
        return 0
    from rlmt.cli.lightning_cli import run as run_trainer

    command = ["fit", *(word for path in paths for word in ("--config", path)), "--print_config"]
    try:
        return run_trainer(command)
    except SystemExit as stop:  # jsonargparse exits after --print_config
        return int(stop.code or 0)


def _copy(name: str, target: Path) -> None:
    """Copies a config to edit.

    Raises:
        UserError: The file exists.
    """
    source = find_config(name)
    if target.exists():
        raise UserError(f"{target}: the file exists; pass another name: rlmt configs copy {name} FILE.")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(Path(source).read_text(encoding="utf-8"), encoding="utf-8")
    print(f"{target}: edit it, then pass --config {target} in place of --config {name}")
