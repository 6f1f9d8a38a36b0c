"""run.json: how a run was started, beside its metrics.csv.

Command, own config files, versions and the state of the working folder's repository are what repeating a run takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from rlmt.checkpointing.files import atomic_write
from rlmt.checkpointing.provenance import git_state, versions
from rlmt.configs import shipped_configs

FILE_NAME = "run.json"


def new_record(arguments: Sequence[str], device: str) -> dict[str, Any]:
    """Describes a start of this process.

    Args:
        arguments: Command line after `rlmt`.
        device: Name and number of the devices.
    """
    return {
        "started": now(),
        "command": with_config_names(arguments),
        "own_configs": own_configs(arguments),
        "versions": versions(),
        "device": device,
        "git": git_state(Path.cwd()),
    }


def now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def config_names(arguments: Sequence[str]) -> list[str]:
    """The values of `--config`, in order."""
    words, names = iter(arguments), []
    for word in words:
        option, equals, value = word.partition("=")
        if option in ("-c", "--config"):
            names.append(value if equals else next(words, ""))
    return names


def with_config_names(arguments: Sequence[str]) -> list[str]:
    """The command line with the names of shipped configs in place of their paths on this machine."""
    names = {str(path): name for name, path in shipped_configs().items()}
    words = [
        option + equals + names.get(value, value) for option, equals, value in (w.partition("=") for w in arguments)
    ]
    return [names.get(word, word) for word in words]


def own_configs(arguments: Sequence[str]) -> dict[str, Any]:
    """Content of the config files that are not shipped with rlmt, by name: they may have changed when they are read."""
    own = [name for name in config_names(with_config_names(arguments)) if name not in shipped_configs()]
    return {name: yaml.safe_load(Path(name).read_text(encoding="utf-8")) for name in own if Path(name).is_file()}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes run.json atomically."""
    with atomic_write(folder / FILE_NAME) as unfinished:
        unfinished.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """Reads run.json; empty if the run has none, as runs of rlmt 0.2 and earlier."""
    file = folder / FILE_NAME
    if not file.is_file():
        return {}
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record
