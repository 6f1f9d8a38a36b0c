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


def run_jobs(jobs: Sequence[Job], keys: Mapping[Path, str], parallel: int) -> None:
    """Runs what is not done yet.

    A job that failed keeps from running only those that need it; what is done stays done, and an unfinished `fit` goes
    on from its last checkpoint the next time.

    Args:
        jobs: in order, with all that they need.
        keys: each job's digest; a folder with another one is made anew, which is said aloud.
        parallel: most jobs at a time.

    Raises:
        UserError: jobs failed, with the reason of the first.
    """
    left = [job for job in jobs if not is_done(job, keys[job.folder])]
    graph = TopologicalSorter({job.folder: set(job.needs) & {other.folder for other in left} for job in left})
    graph.prepare()
    by_folder = {job.folder: job for job in left}
    failed: dict[Path, str] = {}
    running: dict[Future[None], Job] = {}
    threads = max(1, (os.cpu_count() or 1) // parallel)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns) as bars, ThreadPoolExecutor(parallel) as pool:
        whole = bars.add_task("study", total=len(jobs), completed=len(jobs) - len(left), note="")
        waiting: list[Path] = []
        while graph.is_active() or running:
            waiting += graph.get_ready()
            waiting.sort(key=list(by_folder).index)  # first come, first served, seed by seed
            while waiting and len(running) < parallel:
                job = by_folder[waiting.pop(0)]
                if any(need in failed for need in job.needs):
                    failed[job.folder] = ""  # the one that it needs tells why
                    graph.done(job.folder)
                    waiting += graph.get_ready()
                    continue
                bar = bars.add_task(f"  {job.name}", total=None, note="")
                running[pool.submit(_run, job, keys[job.folder], threads, bars, bar)] = job
            if not running:
                break
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                try:
                    future.result()
                except _Failed as error:
                    failed[job.folder] = str(error)
                    bars.console.print(f"[red]failed[/red] {job.name}: {error}", soft_wrap=True)
                graph.done(job.folder)
                bars.update(whole, advance=1, note=f"{int(bars.tasks[whole].completed + 1)} of {len(jobs)} jobs")
    if failed:
        reason = next(text for text in failed.values() if text)
        raise UserError(f"{len(failed)} of {len(jobs)} jobs did not finish: {reason}; mend it and run the study again")


class _Failed(Exception):
    """A command ended with an error."""


def _run(job: Job, key: str, threads: int, bars: Progress, bar: TaskID) -> None:
    state = State.load(job.folder)
    if state is None or state.key != key:
        if job.folder.exists():
            bars.console.print(f"{job.folder}: its settings have changed; it is made anew", soft_wrap=True)
            shutil.rmtree(job.folder)
        job.folder.mkdir(parents=True)
        state = State(key, commands=[shlex.join(["rlmt", *command]) for command in job.commands])
        state.save(job.folder)
    for number in range(state.done, len(job.commands)):
        command = job.commands[number]
        bars.update(bar, note=command[0], total=None)
        start = time.monotonic()
        status = _execute(command, job.folder / LOG, threads, bars, bar)
        state.seconds[str(number)] = state.seconds.get(str(number), 0.0) + round(time.monotonic() - start, 1)
        state.done += status == 0
        state.save(job.folder)
        if status:
            raise _Failed(f"{_last_line(job.folder / LOG)} (exit {status}, {job.folder / LOG})")
    bars.remove_task(bar)


def _execute(command: Sequence[str], log: Path, threads: int, bars: Progress, bar: TaskID) -> int:
    """Runs one command with its output in the log, whose progress bar it repeats."""
    shown = [*command, *(_TQDM if command[0] in ("fit", "validate") else ())]
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as file:
        file.write(f"\n$ rlmt {shlex.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "rlmt", *shown], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        while True:
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                if found := _BAR.findall(_tail(log)):
                    done, total = map(int, found[-1])
                    bars.update(bar, completed=done, total=total, note=f"{command[0]} {done}/{total}")
            except BaseException:
                process.terminate()
                process.wait()
                raise


def _tail(log: Path) -> bytes:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        return file.read()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in _tail(log).decode(errors="replace").replace("\r", "\n").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")
