"""Runs the command of one job; Snakemake starts it as `python -m rlmt.study.job`.

Snakemake decides which jobs run. This adds what it does not know: that a training run resumes from its checkpoints,
which are no output to be removed, unless the command, a config or a job before it has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from rlmt.checkpointing.provenance import source_commit, versions
from rlmt.study.processes import end_with_parent, locked
from rlmt.study.stages import STUDY

STATE_FILE = "job.json"
"""File in the job's folder with its `JobState`."""
LOG_FILE = "log.txt"
_RESUMABLE = ("fit", "distill", "evaluate", "compare", "traits")
"""Commands that go on in the folder of an interrupted run; others start in an empty folder."""


@dataclass
class JobState:
    """What a job ran, as saved in its folder."""

    key: str
    """Digest of everything that the job depends on."""
    command: str
    """The command line."""
    seconds: float = 0.0
    """Run time in seconds, summed over all attempts."""
    status: int | None = None
    """Exit status of the last attempt; None while it runs."""
    finished: str | None = None
    """Time at which the job was done."""
    host: str = field(default_factory=platform.node)
    """Machine of the last attempt."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package → its version."""
    commit: str | None = None
    """Commit of rlmt's checkout; it ends in `+` if files were changed. None outside a checkout."""

    @classmethod
    def load(cls, folder: Path) -> JobState | None:
        """Reads the state from a job's folder; None if there is none, or only one that another version wrote."""
        try:
            return cls(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
        except (FileNotFoundError, TypeError):
            return None

    def provenance(self) -> dict[str, str]:
        """What a result came from: the columns of results.csv."""
        versions = " ".join(f"{package}=={number}" for package, number in self.versions.items())
        origin = {"key": self.key, "commit": self.commit or "", "versions": versions, "finished": self.finished or ""}
        return origin | {"host": self.host, "command": self.command}

    def save(self, path: Path) -> None:
        """Writes the state atomically."""
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)


def is_done(folder: Path) -> bool:
    """Whether the job of a folder is done."""
    state = JobState.load(folder)
    return state is not None and state.finished is not None


def run_job(command: str, key: str, study: Path, done: Path) -> int:
    """Runs a command, or resumes it, unless it is done.

    Args:
        command: The command line without `rlmt`, with `$study` for the study's folder.
        key: Digest of everything that the job depends on. A folder with another one is deleted.
        study: Folder of the study.
        done: File to write when the command is done, in the job's folder.

    Returns:
        Exit status of the command.
    """
    folder = done.parent
    words = [word.replace(STUDY, str(study)) for word in shlex.split(command)]
    with locked(folder):
        state = JobState.load(folder)
        if state is None or state.key != key or (state.finished is None and words[0] not in _RESUMABLE):
            seconds = state.seconds if state is not None and state.key == key else 0.0
            shutil.rmtree(folder, ignore_errors=True)
            state = JobState(key, shlex.join(["rlmt", *words]), seconds)
        folder.mkdir(parents=True, exist_ok=True)
        if state.finished is None:
            state.host, state.versions, state.commit, state.status = platform.node(), versions(), source_commit(), None
            state.save(folder / STATE_FILE)
            start = time.monotonic()
            state.status = _execute(words, folder / LOG_FILE)
            state.seconds = round(state.seconds + time.monotonic() - start, 1)
            state.finished = time.strftime("%Y-%m-%dT%H:%M:%S%z") if state.status == 0 else None
            state.save(folder / STATE_FILE)
        if state.finished is not None:
            state.save(done)
        return state.status or 0


def _execute(words: Sequence[str], log: Path) -> int:
    """Runs a command of rlmt, which ends with this process, and appends its output to the log.

    Args:
        words: The command line without `rlmt`.
        log: File to append the output to.

    Returns:
        The exit status; 128 + its number for a signal.
    """
    with log.open("ab") as file:
        file.write(f"\n$ rlmt {shlex.join(words)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "rlmt", *words],
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            preexec_fn=partial(end_with_parent, signal.SIGTERM, os.getpid()),
        )  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    status = process.wait()
    return status if status >= 0 else 128 - status


def main() -> int:
    """Parses the command line of the rule and runs the job."""
    end_with_parent(signal.SIGTERM)
    parser = argparse.ArgumentParser(prog="rlmt.study.job")
    parser.add_argument("--directory", type=Path, required=True, help="folder in which the command runs")
    parser.add_argument("--study", type=Path, required=True, help="folder of the study, as written in commands")
    parser.add_argument("--done", type=Path, required=True, help="file to write when the command is done")
    parser.add_argument("--key", nargs="+", required=True, help="version and digest of the configs")
    parser.add_argument("--needs", nargs="*", type=Path, required=True, help="files of the jobs that come first")
    parser.add_argument("--command", required=True, help="command line without rlmt")
    options = parser.parse_args()
    key = hashlib.sha256("\n".join([*options.key, options.command]).encode())
    for need in options.needs:
        key.update(need.read_bytes())
    done = options.done.absolute()
    os.chdir(options.directory)
    return run_job(options.command, key.hexdigest()[:16], options.study, done)


if __name__ == "__main__":
    sys.exit(main())
