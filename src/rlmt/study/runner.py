"""Runs the jobs of a study through Snakemake, with a progress bar for each running job."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rlmt.errors import UserError
from rlmt.study.engine import Request
from rlmt.study.job import LOG_FILE, JobState
from rlmt.study.processes import end_with_parent, locked
from rlmt.study.stages import job_name

_POSITION = re.compile(rb"^(?:step|(?:validation |test )?batch|.+:) ([\d,]+) of ([\d,]+)(?: \xc2\xb7 |$)", re.MULTILINE)
"""Position and total in a line that a progress bar of rlmt prints to a file."""
_ERROR_PREFIX = "rlmt: error: "
_TAIL_BYTES = 4096
_NOT_DONE = "not done yet"
_REASONS = {
    "Missing output files": _NOT_DONE,
    "Incomplete output files": "interrupted",
    "Input files updated by another job": "a job before it runs again",
    "Updated input files": "a job before it ran again",
    "Set of input files has changed since last execution": "it needs other jobs than before",
    "Params have changed since last execution": "its command, a config or the version of rlmt changed",
}
"""How a reason of Snakemake begins → the reason in the words of a study."""
_SECONDS_TO_CANCEL = 60.0


def short_reasons(reason: str) -> list[str]:
    """The reasons why a job runs, in the words of a study.

    Args:
        reason: The reasons as Snakemake writes them.
    """
    found = [text for start, text in _REASONS.items() if start in reason]
    return found[:1] if found[:1] == [_NOT_DONE] else found or [reason]


class Runner:
    """Runs those jobs that are not done yet, or lists them.

    Jobs that depend on a failed one are skipped; all others still run. When this process ends, however it ends, its
    jobs end, too; the next run resumes an unfinished training run from its last checkpoint.

    Args:
        request: What Snakemake is asked to do.
        console: Console to print to.
    """

    def __init__(self, request: Request, console: Console | None = None) -> None:
        self._request = request
        self._folder = Path(request.folder)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[note]}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console)
        self._running: dict[Any, tuple[Path, TaskID]] = {}
        self._failed: dict[Any, str] = {}
        self._reasons: dict[Path, list[str]] = {}
        self._errors: list[str] = []
        self._total = self._finished = 0

    def list_jobs(self) -> dict[Path, list[str]]:
        """Returns folder → reasons for each job that would run.

        Raises:
            UserError: Snakemake cannot plan the jobs.
        """
        with self._engine() as (process, events):
            for event in events:
                self._handle(event, show=False)
        self._raise_errors(process.returncode)
        return self._reasons

    def run(self) -> None:
        """Runs the jobs, with one progress bar for the study and one for each running job.

        Raises:
            UserError: Jobs failed; the message has the reason of the first.
        """
        with self._progress, self._engine() as (process, events):
            study = self._progress.add_task("study", total=None, note="")
            for event in events:
                self._handle(event, show=True)
                self._update_bars()
                note = f"{self._finished} of {self._total} jobs" if self._total else ""
                self._progress.update(study, total=self._total or None, completed=self._finished, note=note)
        self._raise_errors(process.returncode)

    @contextmanager
    def _engine(self) -> Iterator[tuple[subprocess.Popen[bytes], Iterator[dict[str, Any]]]]:
        """Starts Snakemake and yields its process and its events; ends its jobs on an exception."""
        with tempfile.TemporaryFile() as messages:
            process = subprocess.Popen(
                [sys.executable, "-m", "rlmt.study.engine"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, start_new_session=True,
                preexec_fn=partial(end_with_parent, signal.SIGKILL, os.getpid()),
            )  # fmt: skip
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(self._request.to_json().encode())
                process.stdin.close()
                yield process, _read_events(process.stdout)
                process.wait()
            except BaseException:
                self._stop(process)
                raise
            if process.returncode and not self._errors and not self._failed:
                messages.seek(0)
                self._errors.append(_last_line(messages.read()))

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        """Ends Snakemake and with it all jobs; those on a cluster are cancelled. Waits for the end of local jobs."""
        if self._request.executor not in ("local", "dryrun"):
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_SECONDS_TO_CANCEL)
            except subprocess.TimeoutExpired:
                self._progress.console.print("The jobs on the cluster were not cancelled in time; look for them.")
        process.kill()
        process.wait()
        for folder, _ in self._running.values():
            with locked(folder):  # a job holds it until it has ended
                pass

    def _handle(self, event: dict[str, Any], show: bool) -> None:
        """Keeps the books of jobs and bars, and prints failures."""
        match event["event"]:
            case "run_info":
                self._total = (event["stats"] or {}).get("total", 0)
            case "job_info":
                folder = self._folder / Path(event["output"][0]).parent
                self._reasons[folder] = short_reasons(event["reason"])
                if show:
                    self._start(event["jobid"], folder)
            case "job_finished" if event["job_id"] in self._running:
                self._finished += 1
                folder, bar = self._running.pop(event["job_id"])
                self._progress.remove_task(bar)
                if show and not self._progress.console.is_terminal:  # where no bar is drawn, as in a log file
                    self._print(f"{job_name(folder)} is done ({self._finished} of {self._total} jobs)")
            case "job_error" if event["jobid"] in self._running:
                folder, bar = self._running.pop(event["jobid"])
                self._progress.remove_task(bar)
                self._failed[event["jobid"]] = reason = failure_reason(folder, event["aux"])
                self._print(f"{job_name(folder)} failed: {reason}")
            case "message":
                self._errors += [" ".join(event["text"].split())] if event["error"] else []

    def _start(self, job: Any, folder: Path) -> None:
        """Adds the bar of a job, and prints why a job that was done runs again."""
        state = JobState.load(folder)
        if state is not None and state.finished is not None:
            self._print(f"{job_name(folder)} runs again: {'; '.join(self._reasons[folder])}")
        self._running[job] = folder, self._progress.add_task(f"  {job_name(folder)}", total=None, note="")

    def _print(self, text: str) -> None:
        """Prints a line above the bars."""
        self._progress.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _update_bars(self) -> None:
        """Shows the position of each job's own progress bar."""
        for folder, bar in self._running.values():
            if positions := _POSITION.findall(_tail(folder / LOG_FILE)):
                done, total = (int(number.replace(b",", b"")) for number in positions[-1])
                self._progress.update(bar, completed=done, total=total, note=f"{done}/{total}")

    def _raise_errors(self, status: int) -> None:
        """Raises a UserError with the first failure."""
        if self._failed:
            count = f"{self._total - self._finished} of {self._total} jobs did not finish"
            reason = next(iter(self._failed.values()))
            raise UserError(f"{count}: {reason}. Fix the cause and run the same study again.")
        if status:
            reason = next(iter(self._errors), f"exit {status}").removesuffix(".")
            raise UserError(f"{self._folder}: Snakemake cannot run the jobs: {reason}. Fix the cause and run it again.")


def failure_reason(folder: Path, details: dict[str, str] | None = None) -> str:
    """The error message of a failed job without its final full stop, or the last line of its log; and where it is.

    Args:
        folder: Folder of the job.
        details: What a cluster reports on it.
    """
    log, state = folder / LOG_FILE, JobState.load(folder)
    lines = [line.strip() for line in _tail(log).decode(errors="replace").replace("\r", "\n").splitlines()]
    errors = [line.partition(_ERROR_PREFIX)[2] for line in lines if _ERROR_PREFIX in line]
    found = errors or [line for line in lines if line] or [str(value) for value in (details or {}).values()]
    reason = (found[-1] if found else "no output").removesuffix(".")
    status = "" if state is None or state.status is None else f"exit {state.status}, "
    return f"{reason} ({status}{min(os.path.relpath(log), str(log), key=len)})"


def _read_events(stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yields Snakemake's events as they come, and the event `pause` whenever none came for half a second."""
    rest = b""
    while True:
        if not select.select([stream], [], [], 0.5)[0]:
            yield {"event": "pause"}
            continue
        if not (read := os.read(stream.fileno(), 1 << 16)):
            return
        *lines, rest = (rest + read).split(b"\n")
        yield from map(json.loads, lines)


def _tail(log: Path) -> bytes:
    """Last `_TAIL_BYTES` bytes of a file; nothing if it does not exist."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            return file.read()
    except FileNotFoundError:
        return b""


def _last_line(text: bytes) -> str:
    """The last line that is not empty."""
    return next((line.strip() for line in reversed(text.decode(errors="replace").splitlines()) if line.strip()), "")
