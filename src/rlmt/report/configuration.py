"""The configuration on a page: what a run sets itself, what differs between runs, and the command that repeats it.

A page is there to be shared, so the values of options that hold a key or a password are masked.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from rlmt.checkpointing.config_changes import flatten
from rlmt.checkpointing.run_record import config_names
from rlmt.configs import shipped_configs
from rlmt.report.runs import Run

Row = tuple[str, ...]

_SECRET = re.compile(r"(api_?key|token|secret|password)$", re.IGNORECASE)
"""End of an option's name whose value is not shown; `api_key_variable` is only the name of a variable."""
_MASK = "***"


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
            before = shown(name, shipped[name]) if name in shipped else "default"
            rows.append((name, before, shown(name, run.config[name])))
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
    rows = [(name, *(shown(name, run.config[name]) if name in run.config else "–" for run in runs)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def shown(name: str, value: Any) -> str:
    """The value of an option as YAML writes it on one line, without secrets."""
    value = _masked(name, value)
    if isinstance(value, str):
        return value
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _is_secret(name: str) -> bool:
    """Whether an option holds a key or a password, by its name."""
    return _SECRET.search(name.removesuffix("+").replace("-", "_")) is not None


def _masked(name: str, value: Any) -> Any:
    """The value of an option with a mask in place of each secret in it."""
    if isinstance(value, Mapping):
        return {key: _masked(str(key), inner) for key, inner in value.items()}
    if value is not None and not isinstance(value, bool) and _is_secret(name):
        return _MASK
    return [_masked(name, inner) for inner in value] if isinstance(value, list) else value


def repeat_command(run: Run) -> str:
    """The command line that repeats a run, without secrets; empty without a record."""
    words: list[str] = []
    option = ""
    for word in run.record.get("command", []):
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            words.append(option + equals + _masked_word(option, value) if equals else word)
        else:
            words.append(_masked_word(option, word))
    return shlex.join(["rlmt", *words]) if words else ""


def _masked_word(option: str, word: str) -> str:
    """A value on a command line with a mask in place of each secret in it."""
    if _is_secret(option):
        return _MASK
    try:
        value = yaml.safe_load(word)
    except yaml.YAMLError:  # a text
        return word
    masked = _masked("", value)
    return word if masked == value else shown("", masked)


def facts(run: Run) -> list[Row]:
    """Start, seed, device, versions and repository of a run, as far as they are known."""
    record: Mapping[str, Any] = run.record
    rows: list[Row] = [("folder", "/".join(run.folder.parts[-2:]))]
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
    return "\n".join(f"{name}: {shown(name, value)}" for name, value in run.config.items())
