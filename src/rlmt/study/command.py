"""The `rlmt study` command: runs the jobs that are not done yet, then writes a report.

A study has no training loop of its own: its jobs are `rlmt` commands, and Snakemake runs them.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Literal

from rich.console import Console

from rlmt import __version__
from rlmt.errors import UserError
from rlmt.options import PositiveInt, check_ranges
from rlmt.report.estimates import Estimate
from rlmt.study.engine import Request
from rlmt.study.job import JobState, is_done
from rlmt.study.processes import locked
from rlmt.study.report import (
    Comparison,
    Findings,
    closing_lines,
    comparison_sentences,
    terminal_table,
    unfinished,
    write_report,
)
from rlmt.study.results import Row, last_values, read_rows
from rlmt.study.runner import Runner
from rlmt.study.stages import Arm, Plan, Stage, job_name, target_files

CONFIG_FILE = "study.json"
"""File in the study's folder with the config of the rules."""


def study(
    stages: dict[str, Stage],
    arms: dict[str, Arm],
    metrics: dict[str, str],
    out: Path,
    title: str = "A study",
    seeds: list[int] | None = None,
    texts: dict[str, str] | None = None,
    comparisons: list[Comparison] | None = None,
    picture: list[str] | None = None,
    meanings: dict[str, str] | None = None,
    example: str | None = None,
    only: list[str] | None = None,
    jobs: PositiveInt = 1,
    executor: Literal["local", "slurm"] = "local",
    resources: dict[str, int | str] | None = None,
    dry_run: bool = False,
    report_only: bool = False,
    command: str = "rlmt study",
) -> None:
    """Runs the jobs of a study that are not done yet, and writes a report on all of them.

    Args:
        stages: Name → a command, run for each seed and each combination of axis values.
        arms: Name → a row of the result tables.
        metrics: Name → the name under which it is logged. The first one is the main metric.
        out: Output folder. Jobs that are already done in it are not run again.
        title: Title of the report.
        seeds: Seeds, fixed before the study; all of them are reported. null uses seed 0.
        texts: Name → text that several commands share.
        comparisons: Differences between arms that the report states.
        picture: Arms in the figure; null writes no figure.
        meanings: Arm or metric → what it is, for the end of the report.
        example: Prompt of the command that the report suggests next.
        only: Arms to run and report; null uses all of them.
        jobs: Maximum number of parallel jobs. On this machine, the CPU cores are divided among them.
        executor: local runs the jobs on this machine, slurm submits each as a job of its own.
        resources: What a job needs on a cluster unless its stage has other values, in the words of Snakemake:
            slurm_account, slurm_partition, gpu, runtime (minutes), mem_mb, …
        dry_run: Prints the jobs that would run, and why, and runs none.
        report_only: Reports on the jobs that are done, while others may still run, and runs none.
        command: Command line that reproduces the report; it is printed in the report.

    Raises:
        UserError: The configuration of the study is invalid, or jobs failed.
    """
    check_ranges(study, locals())
    seeds = seeds or [0]
    _check_options(seeds, jobs, arms, metrics)
    comparisons = comparisons or []
    _check_names("--only", only or [], "arm", arms)
    _check_names("--picture", picture or [], "arm", arms)
    _check_comparisons(comparisons, arms, metrics)
    _check_names("--meanings", list(meanings or {}), "arm or metric", {**arms, **metrics})
    selected = {name: arm for name, arm in arms.items() if only is None or name in only}
    plan = Plan(stages, texts or {})
    plan.check_configs(Path.cwd())
    request = Request(
        targets=target_files(plan, list(selected.values()), seeds),
        threads=int(os.environ.get("OMP_NUM_THREADS") or 0) or max(1, (os.cpu_count() or 1) // jobs),
        jobs=jobs,
        executor=executor,
        executor_settings={"requeue": True} if executor == "slurm" else {},
        resources=resources or {},
    )
    if dry_run:
        list_jobs(plan, out, request)
        return
    if not report_only:
        run_jobs(plan, out, request)
    unfilled = Findings(
        title=title,
        command=command,
        seeds=seeds,
        labels={name: arm.label for name, arm in selected.items()},
        metrics=list(metrics),
        comparisons=comparisons,
        meanings=meanings or {},
    )
    report(plan, out, selected, metrics, unfilled, picture or [], example)


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
    console.print(f"{len(jobs)} jobs would run." if jobs else "All jobs are done.")


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


def report(
    plan: Plan,
    out: Path,
    arms: dict[str, Arm],
    metrics: dict[str, str],
    unfilled: Findings,
    figure: Sequence[str],
    example: str | None = None,
) -> None:
    """Reads the logged metrics of the jobs that are done, writes the report and prints its table and sentences.

    Args:
        plan: The stages.
        out: Folder of the study.
        arms: Name → arm to report.
        metrics: Name → the name under which it was logged.
        unfilled: The findings without the results.
        figure: Names of the arms in the figure.
        example: Prompt of the command that the report suggests next.

    Raises:
        UserError: No arm is done, or a metric was not logged.
    """
    done = {
        name: [seed for seed in unfilled.seeds if is_done(out / plan.folder(arm, seed))] for name, arm in arms.items()
    }
    arms = {name: arm for name, arm in arms.items() if done[name]}
    if not arms:
        raise UserError(f"--out {out}: no arm is done yet; run the study without --report_only.")
    folders = {name: [out / plan.folder(arm, seed) for seed in done[name]] for name, arm in arms.items()}
    states = {name: [JobState.load(folder) for folder in found] for name, found in folders.items()}
    rows = {name: [read_rows(folder) for folder in found] for name, found in folders.items()}
    table = {}
    for name in arms:
        last = [last_values(logged, metrics, folder) for logged, folder in zip(rows[name], folders[name], strict=True)]
        table[name] = {metric: Estimate(tuple(values[metric] for values in last)) for metric in metrics}
    curves = {arms[name].label: rows[name] for name in figure if name in arms}
    findings = replace(
        unfilled,
        table=table,
        minutes={
            name: Estimate(tuple(state.seconds / 60 for state in found if state)) for name, found in states.items()
        },
        done=done,
        provenance={name: [state.provenance() for state in found if state] for name, found in states.items()},
        figure=_draw(out, unfilled.title, curves) if curves else None,
        next_commands=next_commands(unfilled.comparisons, folders, example),
    )
    written = write_report(findings, out)
    console = Console()
    console.print(terminal_table(findings))
    for sentence in comparison_sentences(findings):
        console.print(sentence.replace("**", ""), soft_wrap=True, markup=False, highlight=False)
    for line in [*filter(None, [unfinished(findings)]), *closing_lines(findings)]:
        console.print(line.replace("`", ""), soft_wrap=True, markup=False, highlight=False)
    for path in [*written, *([findings.figure] if findings.figure else [])]:
        console.print(str(path), soft_wrap=True, highlight=False)


def next_commands(
    comparisons: Sequence[Comparison], folders: Mapping[str, Sequence[Path]], example: str | None
) -> list[str]:
    """Commands that chat with the two policies of the first comparison, as far as they are reported.

    Args:
        comparisons: Comparisons of the study.
        folders: Reported arm → folder of its last stage, for each seed.
        example: Prompt; None chats in the terminal.
    """
    prompt = [] if example is None else ["--prompt", example]
    arms = [arm for comparison in comparisons[:1] for arm in (comparison.more, comparison.than) if arm in folders]
    checkpoints = [folders[arm][0] / "latest" / "checkpoints" / "last.ckpt" for arm in arms]
    return [shlex.join(["rlmt", "chat", str(path), *prompt]) for path in checkpoints if path.exists()]


def _check_options(seeds: list[int], jobs: int, arms: Mapping[str, object], metrics: Mapping[str, object]) -> None:
    """Raises a UserError for duplicate seeds, a number of jobs below 1, and a study without arms or metrics."""
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {seeds}: a seed occurs twice; pass each seed once.")
    for option, entries in {"arms": arms, "metrics": metrics}.items():
        if not entries:
            raise UserError(f"--{option}: no entries; define at least one.")


def _check_names(option: str, names: Sequence[str], kind: str, known: Mapping[str, object]) -> None:
    """Raises a UserError for the first unknown name."""
    for name in names:
        if name not in known:
            raise UserError(f"{option}: unknown {kind} {name!r}; choose from {', '.join(known)}.")


def _check_comparisons(
    comparisons: Sequence[Comparison], arms: Mapping[str, object], metrics: Mapping[str, object]
) -> None:
    """Raises a UserError for a comparison of unknown arms or by an unknown metric."""
    _check_names("--comparisons", [name for it in comparisons for name in (it.more, it.than)], "arm", arms)
    _check_names("--comparisons", [it.by for it in comparisons if it.by is not None], "metric", metrics)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Turns SIGTERM into SystemExit, so that the runner terminates its jobs."""
    raise SystemExit(128 + number)


def _draw(out: Path, title: str, curves: dict[str, list[list[Row]]]) -> Path:
    """Writes the figure of the study."""
    # Imported here because matplotlib takes a second to load.
    from rlmt.study.figure import draw_study

    return draw_study(out / "curves.png", title, curves)
