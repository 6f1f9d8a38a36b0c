"""Runs the jobs of a study in subprocesses, several at a time, and saves which commands are done."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rlmt.errors import UserError
from rlmt.study.stages import Job

STATE_FILE = "job.json"
"""File in the job's folder with its `JobState`."""
LOG_FILE = "log.txt"
_TQDM_POSITION = re.compile(rb"(\d+)/(\d+) \[")
"""Position and total of a tqdm progress bar."""
_TQDM_OPTIONS = ("--trainer.callbacks+", "lightning.pytorch.callbacks.TQDMProgressBar")
"""Unlike the rich progress bar, tqdm's also writes to a file."""
_ERROR_PREFIX = "rlmt: error: "
_TAIL_BYTES = 4096


@dataclass
class JobState:
    """Progress of a job, as saved in its folder."""

    key: str
    """Digest of everything that the job depends on."""
    done: int = 0
    """Number of commands that are done."""
    commands: list[str] = field(default_factory=list)
    """The command lines of the job."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Index of the command → run time in seconds, summed over all attempts."""

    @classmethod
    def load(cls, folder: Path) -> JobState | None:
        """Reads the state from a job's folder; None if no job was started there."""
        try:
            return cls(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def save(self, folder: Path) -> None:
        """Writes the state atomically."""
        temporary = folder / f".{STATE_FILE}.tmp"
        temporary.write_text(json.dumps(self.__dict__, indent=2) + "\n", encoding="utf-8")
        temporary.replace(folder / STATE_FILE)


def is_done(job: Job, key: str) -> bool:
    """Whether all commands of a job are done with its present settings."""
    state = JobState.load(job.folder)
    return state is not None and state.key == key and state.done == len(job.commands)


class _JobFailed(Exception):
    """A command of the job failed; the message is empty if a job that it depends on failed."""


class Runner:
    """Runs those of some jobs that are not done yet.

    The jobs that depend on a failed one are skipped; all others still run. Jobs that are done are not run again, and
    the next run resumes an unfinished `fit` from its last checkpoint.

    Args:
        jobs: The jobs in order, with every job that they depend on.
        keys: Folder of each job → its digest. A folder with another digest is deleted, with a message, and made again.
        parallel: Maximum number of parallel jobs.
    """

    def __init__(self, jobs: Sequence[Job], keys: Mapping[Path, str], parallel: int) -> None:
        self.jobs, self.keys, self.parallel = list(jobs), keys, parallel
        self._pending = {job.folder: job for job in jobs if not is_done(job, keys[job.folder])}
        self._failed: dict[Path, str] = {}
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopping = False
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        self._progress = Progress(*columns, TimeElapsedColumn())

    def run(self) -> None:
        """Runs the jobs, with one progress bar for the study and one for each running job.

        Raises:
            UserError: Jobs failed; the message has the reason of the first.
        """
        graph = TopologicalSorter(
            {folder: set(job.needs) & set(self._pending) for folder, job in self._pending.items()}
        )
        graph.prepare()
        order = list(self._pending)
        running: dict[Future[None], Job] = {}
        waiting: list[Path] = []
        with self._progress, ThreadPoolExecutor(self.parallel) as pool:
            done = len(self.jobs) - len(order)
            study = self._progress.add_task("study", total=len(self.jobs), completed=done, note="")
            try:
                while graph.is_active():
                    waiting = sorted([*waiting, *graph.get_ready()], key=order.index)  # seed by seed, as planned
                    while waiting and len(running) < self.parallel:
                        job = self._pending[waiting.pop(0)]
                        running[pool.submit(self._run_job, job)] = job
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job = running.pop(future)
                        self._record_failure(job, future)
                        graph.done(job.folder)
                        done += 1
                        self._progress.update(study, completed=done, note=f"{done} of {len(self.jobs)} jobs")
            except BaseException:
                self._stopping = True
                for process in list(self._processes):
                    process.terminate()
                raise
        if self._failed:
            reason = next(text for text in self._failed.values() if text)
            count = f"{len(self._failed)} of {len(self.jobs)} jobs did not finish"
            raise UserError(f"{count}: {reason}. Fix the cause and run the same study again.")

    def _record_failure(self, job: Job, future: Future[None]) -> None:
        """Stores and prints why a job failed, if it did."""
        try:
            future.result()
        except _JobFailed as error:
            self._failed[job.folder] = str(error)
            if str(error):
                self._progress.console.print(f"{job.name} failed: {error}", soft_wrap=True, markup=False)

    def _run_job(self, job: Job) -> None:
        """Runs the commands of one job that are not done yet; called in a thread of its own."""
        if self._stopping or any(need in self._failed for need in job.needs):
            raise _JobFailed  # without a message: the job that it depends on has the reason
        key = self.keys[job.folder]
        state = JobState.load(job.folder)
        if state is None or state.key != key:
            if state is not None:
                note = f"{job.folder}: the settings have changed; the folder is deleted and the job starts again."
                self._progress.console.print(note, soft_wrap=True)
                shutil.rmtree(job.folder)
            job.folder.mkdir(parents=True, exist_ok=True)
            state = JobState(key, commands=[shlex.join(["rlmt", *command]) for command in job.commands])
            state.save(job.folder)
        bar = self._progress.add_task(f"  {job.name}", total=None, note="")
        for number in range(state.done, len(job.commands)):
            command = job.commands[number]
            if command[0] == "export" and job.folder in (target := Path(command[-1])).parents:
                # The folder exists if the study was killed after the export and before its state was saved.
                shutil.rmtree(target, ignore_errors=True)
            start = time.monotonic()
            status = self._execute(command, job.folder / LOG_FILE, bar)
            state.seconds[str(number)] = state.seconds.get(str(number), 0.0) + round(time.monotonic() - start, 1)
            state.done += status == 0
            state.save(job.folder)
            if status:
                self._progress.remove_task(bar)
                raise _JobFailed(f"{_failure_reason(job.folder / LOG_FILE)} (exit {status}, {job.folder / LOG_FILE})")
        self._progress.remove_task(bar)

    def _execute(self, command: Sequence[str], log: Path, bar: TaskID) -> int:
        """Runs one command, writes its output to the log, and shows the position of its progress bar.

        Args:
            command: The command line without `rlmt`.
            log: File to append the output to.
            bar: Progress bar of the job.

        Returns:
            The exit status.
        """
        arguments = [*command, *(_TQDM_OPTIONS if command[0] in ("fit", "validate") else ())]
        threads = max(1, (os.cpu_count() or 1) // self.parallel)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
        self._progress.update(bar, note=command[0], total=None)
        with log.open("ab") as file:
            file.write(f"\n$ rlmt {shlex.join(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "rlmt", *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment
            )
        self._processes.add(process)
        if self._stopping:
            process.terminate()
        while True:
            try:
                status = process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                if positions := _TQDM_POSITION.findall(_tail(log)):
                    done, total = map(int, positions[-1])
                    self._progress.update(bar, completed=done, total=total, note=f"{command[0]} {done}/{total}")
            else:
                self._processes.remove(process)
                return status


def _tail(log: Path) -> bytes:
    """Last `_TAIL_BYTES` bytes of a file."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        return file.read()


def _failure_reason(log: Path) -> str:
    """The error message of a failed command without its final full stop, or the last line of its log."""
    lines = [line.strip() for line in _tail(log).decode(errors="replace").replace("\r", "\n").splitlines()]
    errors = [line.partition(_ERROR_PREFIX)[2] for line in lines if _ERROR_PREFIX in line]
    return next(reversed(errors or [line for line in lines if line]), "no output").removesuffix(".")
