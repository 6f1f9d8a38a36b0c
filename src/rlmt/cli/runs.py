"""`rlmt runs`: a table of the training runs in a folder."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rlmt.errors import UserError
from rlmt.report.run_states import Run, find_runs, finite

_REFRESH = 2.0
"""Seconds between two refreshes of `--watch`."""
_STYLES = {"running": "green", "finished": "", "interrupted": "yellow", "failed": "red"}
_AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def run(args: Sequence[str]) -> int:
    """Runs `rlmt runs [FOLDER] [--watch] [--json]`.

    Args:
        args: Arguments after `rlmt runs`.

    Returns:
        Exit status 0.

    Raises:
        UserError: The folder does not exist, or `--watch` has no terminal.
    """
    # The standard library's parser: jsonargparse takes seconds to import.
    parser = argparse.ArgumentParser(
        prog="rlmt runs", description="Lists training runs with state, step, reward, thought length and verdict."
    )
    add_arguments(parser)
    options = parser.parse_args(list(args))
    if not options.folder.is_dir():
        raise UserError(f"{options.folder}: no such folder; pass the folder of your runs.")
    console = Console()
    if options.json:
        print(json.dumps([as_json(each) for each in find_runs(options.folder)], indent=2))
    elif options.watch:
        _watch(options.folder, console)
    elif runs := find_runs(options.folder):
        console.print(runs_table(runs, options.folder))
    else:
        print(f"{options.folder}: no training runs yet.")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `rlmt runs`."""
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="folder to search (default: runs)")
    parser.add_argument("--watch", action="store_true", help="refresh the table until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print JSON, one object for each run")


def _watch(folder: Path, console: Console) -> None:
    """Refreshes the table until Ctrl-C, cut to the height of the terminal."""
    if not console.is_terminal:
        raise UserError("--watch: the output is not a terminal; leave it out, or use --json.")
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(runs_table(find_runs(folder)[: max(1, console.height - 5)], folder), refresh=True)
                time.sleep(_REFRESH)
    except KeyboardInterrupt:
        return


def runs_table(runs: Sequence[Run], root: Path) -> Table:
    """The table of some runs.

    Args:
        runs: Runs, in the order of the rows.
        root: Folder that was searched; a run is named by its path in it.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("step", "reward", "thought"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    table.add_column("age", justify="right", no_wrap=True)
    now = time.time()
    for each in runs:
        table.add_row(
            Text(_name(each, root)),
            Text(each.state or "–", style=_STYLES.get(each.state or "", "")),
            f"{each.step} of {each.steps}" if each.steps else str(each.step),
            Text(_result(each)),
            Text(_thought(each)),
            Text(each.error or each.verdict),
            age(now - each.updated),
        )
    return table


def as_json(each: Run) -> dict[str, Any]:
    """A run as plain data: `reward` and `thought` with the names of the metrics, times in UTC."""
    values: dict[str, Any] = {"folder": str(each.folder), "state": each.state, "step": each.step, "steps": each.steps}
    for name in ("reward", "thought", "loss", "accuracy"):
        if reported := each.reported(name):
            values[name] = {"metric": reported[0], "value": finite(reported[1])}
    updated = datetime.fromtimestamp(each.updated, UTC).isoformat(timespec="seconds")
    return values | {"verdict": each.verdict, "error": each.error, "updated": updated}


def age(seconds: float) -> str:
    """A time span in one unit: `12 s`, `5 min`, `3 h`, `2 d`."""
    size, unit = next(((size, unit) for size, unit in _AGES if seconds >= size), _AGES[-1])
    return f"{max(0, int(seconds / size))} {unit}"


def _name(each: Run, root: Path) -> str:
    """Path of a run in the folder that was searched."""
    relative = str(each.folder.relative_to(root))
    return each.folder.name if relative == "." else relative


def _result(each: Run) -> str:
    """The reward, or of supervised runs accuracy or loss, on held-out data if it was logged."""
    name = next((name for name in ("reward", "accuracy", "loss") if each.reported(name)), None)
    if name is None or (reported := each.reported(name)) is None:
        return ""
    metric, value = reported
    label = "" if name == "reward" else f"{name} "
    return f"{label}{value:.3g}{' val' if metric.startswith('val/') else ''}"


def _thought(each: Run) -> str:
    """Mean length of the thoughts in tokens; "" without thinking."""
    reported = each.reported("thought")
    return f"{reported[1]:.3g}" if reported and reported[1] else ""
