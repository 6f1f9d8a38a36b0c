"""Runs or lists the jobs of a study in its folder."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FrameType

from rich.console import Console

from rlmt import __version__
from rlmt.errors import UserError
from rlmt.study.engine import Request
from rlmt.study.processes import end_with_parent, locked
from rlmt.study.runner import Runner
from rlmt.study.stages import Plan, Stage, job_name

CONFIG_FILE = "study.json"
"""File in the study's folder with the config of the rules."""


def run_jobs(plan: Plan, out: Path, request: Request) -> None:
    """Runs the jobs that are not done yet.

    Args:
        plan: The stages.
        out: Folder of the study.
        request: What to run and where.

    Raises:
        UserError: Jobs failed, or another process runs jobs in the folder.
    """
    signal.signal(signal.SIGTERM, _exit_on_signal)
    other = f"--out {out}: another `rlmt study` works in this folder; wait for it, or choose another folder."
    with locked(out / "study", other):
        Runner(replace(request, folder=str(out.absolute()), config=_write_config(plan, out, request, out))).run()


@contextmanager
def served(command: str) -> Iterator[None]:
    """Runs a server, which ends with this process.

    Args:
        command: Module and arguments for `python -m`; empty runs none.

    Raises:
        UserError: The server does not start.
    """
    if not command.strip():
        yield
        return
    process = subprocess.Popen(
        [sys.executable, "-m", *shlex.split(command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=partial(end_with_parent, signal.SIGTERM, os.getpid()),
    )  # fmt: skip
    try:
        if process.stdout is None or not process.stdout.readline():
            message = process.communicate()[1].strip().splitlines()
            raise UserError(f"--serve {command}: does not start: {message[-1] if message else 'no message'}.")
        for stream in (process.stdout, process.stderr):  # a full pipe would stop the server
            threading.Thread(target=deque, args=(stream, 0), daemon=True).start()
        yield
    finally:
        process.terminate()
        process.wait()


def list_jobs(plan: Plan, out: Path, request: Request) -> None:
    """Prints the jobs that would run, and why.

    Args:
        plan: The stages.
        out: Folder of the study; it is not created.
        request: What to run and where.

    Raises:
        UserError: Snakemake cannot plan the jobs.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = out.absolute() if out.exists() else Path(temporary)
        config = _write_config(plan, out, request, Path(temporary))
        jobs = Runner(replace(request, folder=str(folder), config=config, executor="dryrun")).list_jobs()
    console = Console(highlight=False)
    for job, reasons in jobs.items():
        console.print(f"{job_name(job)}: {'; '.join(reasons)}", soft_wrap=True, markup=False)
    print_totals([plan.stages[job.name.partition("-")[0]] for job in jobs], console)


def print_totals(stages: Sequence[Stage], console: Console) -> None:
    """Prints the number of jobs and what they take, by the resources of their stages.

    Args:
        stages: The stage of each job.
        console: Console to print to.
    """
    if not stages:
        console.print("All jobs are done.")
        return

    def total(name: str, per: str | None = None) -> float:
        factors = [float(stage.resources.get(per, 0)) if per else 1.0 for stage in stages]
        return sum(float(stage.resources.get(name, 0)) * factor for stage, factor in zip(stages, factors, strict=True))

    amounts = {
        "{:,.0f} GPU hours at most": total("gpu", per="runtime") / 60,
        "{:,.0f} GB on disk": total("disk_mb") / 1000,
        "{:,.0f} dollars for teachers and judges": total("dollars"),
    }
    texts = [text.format(amount) for text, amount in amounts.items() if amount]
    console.print(f"{len(stages)} jobs would run{': ' if texts else ''}{', '.join(texts)}.", soft_wrap=True)


def _write_config(plan: Plan, out: Path, request: Request, folder: Path) -> str:
    """Writes the config of the rules into a folder, and returns the path of the file."""
    config = {
        "stages": {name: asdict(stage) for name, stage in plan.stages.items()},
        "texts": plan.texts,
        "study": str(out),
        "directory": str(Path.cwd()),
        "threads": request.threads,
        "version": __version__,
        "python": sys.executable,
    }
    path = folder.absolute() / CONFIG_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return str(path)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Turns SIGTERM into SystemExit, so that the runner ends its jobs."""
    raise SystemExit(128 + number)
