"""Runs jobs as processes of their own, some at a time, and keeps what is done."""

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

STATE = "job.json"
"""In a job's folder: what it is, and how far it got."""
LOG = "log.txt"
_BAR = re.compile(rb"(\d+)/(\d+) \[")
"""How far a progress bar of tqdm is."""
_TQDM = ("--trainer.callbacks+", "lightning.pytorch.callbacks.TQDMProgressBar")
"""The bar that writes to a file, too."""
_ERROR = "rlmt: error: "
_TAIL = 4096


@dataclass
class State:
    """How far a job got, as saved in its folder."""

    key: str
    """Digest of what it depends on."""
    done: int = 0
    """How many of its commands are done."""
    commands: list[str] = field(default_factory=list)
    """Its command lines."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Command's number → seconds it took, over all attempts."""

    @classmethod
    def load(cls, folder: Path) -> State | None:
        """What a folder says of itself; None where nothing ran yet."""
        try:
            return cls(**json.loads((folder / STATE).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def save(self, folder: Path) -> None:
        """Replaces the file in one go."""
        unfinished = folder / f".{STATE}.tmp"
        unfinished.write_text(json.dumps(self.__dict__, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(folder / STATE)


def is_done(job: Job, key: str) -> bool:
    """Whether a job ran to its end as it stands now."""
    state = State.load(job.folder)
    return state is not None and state.key == key and state.done == len(job.commands)


class _Failed(Exception):
    """A command ended with an error."""


class Runner:
    """Runs what is not done yet of some jobs.

    A job that failed keeps from running only those that need it; what is done stays done, and an unfinished `fit` goes
    on from its last checkpoint the next time.

    Args:
        jobs: in order, with all that they need.
        keys: each job's digest; a folder with another one is made anew, which is said aloud.
        parallel: most jobs at a time.
    """

    def __init__(self, jobs: Sequence[Job], keys: Mapping[Path, str], parallel: int) -> None:
        self.jobs, self.keys, self.parallel = list(jobs), keys, parallel
        self._left = {job.folder: job for job in jobs if not is_done(job, keys[job.folder])}
        self._failed: dict[Path, str] = {}
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._ending = False
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        self._bars = Progress(*columns, TimeElapsedColumn())

    def run(self) -> None:
        """Runs them, with a progress bar for each that runs and one for all.

        Raises:
            UserError: jobs failed, with the reason of the first.
        """
        graph = TopologicalSorter({folder: set(job.needs) & set(self._left) for folder, job in self._left.items()})
        graph.prepare()
        order = list(self._left)
        running: dict[Future[None], Job] = {}
        waiting: list[Path] = []
        with self._bars, ThreadPoolExecutor(self.parallel) as pool:
            done = len(self.jobs) - len(order)
            whole = self._bars.add_task("study", total=len(self.jobs), completed=done, note="")
            try:
                while graph.is_active():
                    waiting = sorted([*waiting, *graph.get_ready()], key=order.index)  # seed by seed, as planned
                    while waiting and len(running) < self.parallel:
                        job = self._left[waiting.pop(0)]
                        running[pool.submit(self._run, job)] = job
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job = running.pop(future)
                        self._note(job, future)
                        graph.done(job.folder)
                        done += 1
                        self._bars.update(whole, completed=done, note=f"{done} of {len(self.jobs)} jobs")
            except BaseException:
                self._ending = True
                for process in list(self._processes):
                    process.terminate()
                raise
        if self._failed:
            reason = next(text for text in self._failed.values() if text)
            count = f"{len(self._failed)} of {len(self.jobs)} jobs did not finish"
            raise UserError(f"{count}: {reason}; mend it and run the study again")

    def _note(self, job: Job, future: Future[None]) -> None:
        try:
            future.result()
        except _Failed as error:
            self._failed[job.folder] = str(error)
            if str(error):
                self._bars.console.print(f"{job.name} failed: {error}", soft_wrap=True, markup=False)

    def _run(self, job: Job) -> None:
        """Runs one job's commands, from the one that was not done; in a thread of its own."""
        if self._ending or any(need in self._failed for need in job.needs):
            raise _Failed  # the one that it needs tells why
        key = self.keys[job.folder]
        state = State.load(job.folder)
        if state is None or state.key != key:
            if state is not None:
                self._bars.console.print(f"{job.folder}: its settings have changed; it is made anew", soft_wrap=True)
                shutil.rmtree(job.folder)
            job.folder.mkdir(parents=True, exist_ok=True)
            state = State(key, commands=[shlex.join(["rlmt", *command]) for command in job.commands])
            state.save(job.folder)
        bar = self._bars.add_task(f"  {job.name}", total=None, note="")
        for number in range(state.done, len(job.commands)):
            command = job.commands[number]
            if command[0] == "export" and job.folder in (target := Path(command[-1])).parents:
                shutil.rmtree(target, ignore_errors=True)  # the study was killed before it noted it
            start = time.monotonic()
            status = self._execute(command, job.folder / LOG, bar)
            state.seconds[str(number)] = state.seconds.get(str(number), 0.0) + round(time.monotonic() - start, 1)
            state.done += status == 0
            state.save(job.folder)
            if status:
                self._bars.remove_task(bar)
                raise _Failed(f"{_reason(job.folder / LOG)} (exit {status}, {job.folder / LOG})")
        self._bars.remove_task(bar)

    def _execute(self, command: Sequence[str], log: Path, bar: TaskID) -> int:
        """Runs one command with its output in the log, whose progress bar it repeats.

        Returns:
            Its exit status.
        """
        shown = [*command, *(_TQDM if command[0] in ("fit", "validate") else ())]
        threads = max(1, (os.cpu_count() or 1) // self.parallel)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
        self._bars.update(bar, note=command[0], total=None)
        with log.open("ab") as file:
            file.write(f"\n$ rlmt {shlex.join(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "rlmt", *shown], stdout=file, stderr=subprocess.STDOUT, env=environment
            )
        self._processes.add(process)
        if self._ending:
            process.terminate()
        while True:
            try:
                status = process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                if found := _BAR.findall(_tail(log)):
                    done, total = map(int, found[-1])
                    self._bars.update(bar, completed=done, total=total, note=f"{command[0]} {done}/{total}")
            else:
                self._processes.remove(process)
                return status


def _tail(log: Path) -> bytes:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        return file.read()


def _reason(log: Path) -> str:
    """Why a command failed: its message, or else its last line."""
    lines = [line.strip() for line in _tail(log).decode(errors="replace").replace("\r", "\n").splitlines()]
    told = [line.partition(_ERROR)[2] for line in lines if _ERROR in line]
    return next(reversed(told or [line for line in lines if line]), "no output")
