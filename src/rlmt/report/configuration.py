"""The configuration on a page: what a run sets itself, what differs between runs, and the command that repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from rlmt.checkpointing.config_changes import flatten
from rlmt.checkpointing.run_record import config_names
from rlmt.configs import shipped_configs
from rlmt.report.runs import Run

Row = tuple[str, ...]


def own_settings(run: Run) -> list[Row]:
    """The options that a run sets beside the shipped configs that it names.

    Returns:
        Option, value in those configs (`default` if they do not set it) and value in this run; only where the values
        differ. Empty for a run without a record.
    """
    command = run.record.get("command", [])
    shipped: dict[str, Any] = {}
    names = shipped_configs()
    for name in config_names(command):
        if name in names:
            shipped.update(flatten(yaml.safe_load(names[name].read_text(encoding="utf-8")) or {}))
    chosen = {_plain(name): None for name in _options(command)}
    for tree in run.record.get("own_configs", {}).values():
        chosen |= dict.fromkeys(name.removesuffix("+") for name, _ in flatten(tree or {}))
    rows: list[Row] = []
    for name in chosen:
        if name in run.config and not (name in shipped and run.config[name] == shipped[name]):
            rows.append((name, shown(shipped[name]) if name in shipped else "default", shown(run.config[name])))
    return rows


def _options(command: Sequence[str]) -> list[str]:
    """Names of the options on a command line, except `--config`."""
    names = [word.partition("=")[0].removeprefix("--") for word in command if word.startswith("--")]
    return [name for name in names if name not in ("config", "ckpt_path")]


def _plain(option: str) -> str:
    """An option under its short name: `model.init_args.format` is `model.format`."""
    parts = option.removesuffix("+").split(".")
    return ".".join(part for part in parts if part not in ("init_args", "class_path"))


def differences(runs: Sequence[Run]) -> list[Row]:
    """The options that differ between runs: the option, and its value in each run."""
    names = sorted({name for run in runs for name in run.config})
    rows = [(name, *(shown(run.config[name]) if name in run.config else "–" for run in runs)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def shown(value: Any) -> str:
    """A value as YAML writes it on one line."""
    if isinstance(value, str):
        return value
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def repeat_command(run: Run) -> str:
    """The command line that repeats a run; empty without a record."""
    command = run.record.get("command", [])
    return shlex.join(["rlmt", *command]) if command else ""


def facts(run: Run) -> list[Row]:
    """Start, seed, device, versions and repository of a run, as far as they are known."""
    record: Mapping[str, Any] = run.record
    rows: list[Row] = [("folder", str(run.folder))]
    rows += [(name, str(record[name])) for name in ("started", "device") if record.get(name)]
    if run.seed is not None:
        rows.append(("seed", str(run.seed)))
    rows += [(package, number) for package, number in record.get("versions", {}).items()]
    if git := record.get("git"):
        changed = f", {git['changed_files']} changed files" if git["changed_files"] else ", no changes"
        rows.append(("repository", git["commit"][:12] + changed))
    return rows


def whole(run: Run) -> str:
    """Every option of a run, one a line."""
    return "\n".join(f"{name}: {shown(value)}" for name, value in run.config.items())
