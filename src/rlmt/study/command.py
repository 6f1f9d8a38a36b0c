"""The `rlmt study` command: runs the jobs that are not done yet, then writes a report.

A study has no training loop of its own: its jobs are `rlmt` commands, and Snakemake runs them.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rlmt.errors import UserError
from rlmt.evaluation.statistics import Interval
from rlmt.options import PositiveInt, check_ranges
from rlmt.report.estimates import Estimate
from rlmt.report.page import write_page
from rlmt.report.results import read_sections
from rlmt.report.runs import read_run
from rlmt.report.sections import Section, plain
from rlmt.study.checks import check_comparisons, check_executor, check_names, check_options, texts_of_scale
from rlmt.study.engine import Request
from rlmt.study.findings import Comparison, Findings
from rlmt.study.job import JobState, is_done
from rlmt.study.jobs import list_jobs, run_jobs, served
from rlmt.study.report import make_sections, print_report, write_report
from rlmt.study.results import Row, interval_over_prompts, last_values, read_rows
from rlmt.study.samples import answers_to_same_prompts, sample_lines
from rlmt.study.stages import Arm, Plan, Stage, target_files

_ANALYSES = ("compare", "traits")
"""Commands that write a report of their own and no metrics."""
_SAMPLED_ARMS = 4


def study(
    stages: dict[str, Stage],
    arms: dict[str, Arm],
    metrics: dict[str, str],
    out: Path,
    title: str = "A study",
    seeds: list[int] | None = None,
    texts: dict[str, str] | None = None,
    scales: dict[str, dict[str, str]] | None = None,
    scale: str | None = None,
    comparisons: list[Comparison] | None = None,
    picture: list[str] | None = None,
    tables: dict[str, list[str]] | None = None,
    meanings: dict[str, str] | None = None,
    example: str | None = None,
    only: list[str] | None = None,
    jobs: PositiveInt = 1,
    executor: Literal["local", "slurm"] = "local",
    resources: dict[str, int | str] | None = None,
    serve: str | None = None,
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
        scales: Name → texts that are added: models, data and sizes of the same study, large or small.
        scale: The scale to use; the study is in the folder of that name in `out`.
        comparisons: Differences between arms that the report states.
        picture: Arms in the figure; null writes no figure.
        tables: Name → the arms of a table of the report; arms in none are in one table.
        meanings: Arm or metric → what it is, for the end of the report.
        example: Prompt of the command that the report suggests next.
        only: Arms, or tables with all their arms, to run and report; null uses all.
        jobs: Maximum number of parallel jobs. On this machine, the CPU cores are divided among them.
        executor: local runs the jobs on this machine, slurm submits each as a job of its own.
        resources: What a job needs on a cluster unless its stage has other values, in the words of Snakemake:
            slurm_account, slurm_partition, gpu, runtime (minutes), mem_mb, …
        serve: Module and arguments of a server that runs while the jobs run (`python -m …`), with the study's texts; it
            prints a line when it is ready. Empty starts none.
        dry_run: Prints the jobs that would run, and why, and runs none.
        report_only: Reports on the jobs that are done, while others may still run, and runs none.
        command: Command line that reproduces the report; it is printed in the report.

    Raises:
        UserError: The configuration of the study is invalid, or jobs failed.
    """
    check_ranges(study, locals())
    seeds, comparisons, tables = seeds or [0], comparisons or [], tables or {}
    check_options(seeds, arms, metrics, tables)
    check_names("--only", only or [], "arm", {**arms, **tables})
    check_names("--picture", picture or [], "arm", arms)
    check_names("--meanings", list(meanings or {}), "arm or metric", {**arms, **metrics})
    check_comparisons(comparisons, arms, metrics)
    check_executor(executor)
    chosen = arms if only is None else {arm for name in only for arm in tables.get(name, [name])}
    selected = {name: arm for name, arm in arms.items() if name in chosen}
    of_scale = texts_of_scale(scale, scales or {})
    out = out / scale if scale else out
    plan = Plan(stages, of_scale | (texts or {}))
    plan.check_configs(Path.cwd())
    targets = target_files(plan, list(selected.values()), seeds)
    request = Request(targets, _threads(jobs), jobs, executor, resources=resources or {})
    if dry_run:
        list_jobs(plan, out, request)
        return
    if not report_only:
        with served(plan.with_texts(serve or "", "serve")):
            run_jobs(plan, out, request)
    unfilled = Findings(
        title=title,
        command=command,
        seeds=seeds,
        labels={name: arm.label for name, arm in selected.items()},
        metrics=list(metrics),
        comparisons=comparisons,
        meanings=meanings or {},
        tables=tables,
        paper={name: arm.paper for name, arm in selected.items()},
    )
    report(plan, out, selected, metrics, unfilled, picture or [], example)


def _threads(jobs: int) -> int:
    """CPU threads of each of some parallel jobs."""
    return int(os.environ.get("OMP_NUM_THREADS") or 0) or max(1, (os.cpu_count() or 1) // jobs)


def report(
    plan: Plan,
    out: Path,
    arms: dict[str, Arm],
    metrics: dict[str, str],
    unfilled: Findings,
    figure: Sequence[str],
    example: str | None = None,
) -> None:
    """Reads the logged metrics of the jobs that are done, writes the report and prints its tables and sentences.

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
    trained = {name: [out / plan.training_folder(arm, seed) for seed in done[name]] for name, arm in arms.items()}
    scored = [name for name, arm in arms.items() if plan.program(arm.stage) not in _ANALYSES]
    states = {name: [JobState.load(folder) for folder in folders[name]] for name in scored}
    curves = {arms[name].label: [read_rows(folder) for folder in trained[name]] for name in figure if name in arms}
    findings = replace(
        unfilled,
        table={name: _estimates(folders[name], metrics) for name in scored},
        minutes={
            name: Estimate(tuple(state.seconds / 60 for state in found if state)) for name, found in states.items()
        },
        done=done,
        over_prompts=_over_prompts(
            unfilled.comparisons,
            metrics,
            {name: dict(zip(done[name], folders[name], strict=True)) for name in scored},
        ),
        provenance={name: [state.provenance() for state in found if state] for name, found in states.items()},
        analyses=[
            replace(section, title=f"{section.title}, seed {seed}" if len(unfilled.seeds) > 1 else section.title)
            for name in arms
            if name not in scored
            for seed, folder in zip(done[name], folders[name], strict=True)
            for section in read_sections(folder)
        ],
        figure=_draw(out, unfilled.title, curves) if curves else None,
        samples=_samples(unfilled, trained),
        next_commands=next_commands(unfilled.comparisons, trained, example),
    )
    sections = make_sections(findings)
    page = write_study_page(findings, sections, trained, [name for name in figure if name in arms] or scored, out)
    print_report(findings.title, sections, [page, *write_report(findings, sections, out)])


def _estimates(folders: Sequence[Path], metrics: dict[str, str]) -> dict[str, Estimate]:
    """Metric → its last value in each of the folders of an arm."""
    last = [last_values(read_rows(folder), metrics, folder) for folder in folders]
    return {metric: Estimate(tuple(values[metric] for values in last)) for metric in metrics}


def write_study_page(
    findings: Findings,
    sections: Sequence[Section],
    trained: Mapping[str, Sequence[Path]],
    shown: Sequence[str],
    out: Path,
) -> Path:
    """Writes report.html: the page of `rlmt report` with the sections of the study.

    Args:
        findings: What the report shows.
        sections: Its sections.
        trained: Arm → folders of its training runs, one for each seed that is done.
        shown: Arms whose runs it shows; those of an arm are one curve with a band.
        out: Folder of the study.

    Returns:
        The path.
    """
    runs = [
        read_run(folder, label=f"{findings.labels[name]}, seed {seed}", arm=findings.labels[name])
        for name in shown
        for folder, seed in zip(trained[name], findings.seeds_of(name), strict=True)
        if any(folder.glob("version_*/metrics.csv"))  # none of `rlmt evaluate`
    ]
    in_plain = [replace(section, texts=[plain(text) for text in section.texts if text]) for section in sections]
    return write_page(out / "report.html", findings.title, runs, in_plain)


def next_commands(
    comparisons: Sequence[Comparison], folders: Mapping[str, Sequence[Path]], example: str | None
) -> list[str]:
    """Commands that chat with the two policies of the first comparison, as far as they are reported.

    Args:
        comparisons: Comparisons of the study.
        folders: Reported arm → folder of its training run, for each seed.
        example: Prompt; None chats in the terminal.
    """
    prompt = [] if example is None else ["--prompt", example]
    arms = [arm for comparison in comparisons[:1] for arm in (comparison.more, comparison.than) if arm in folders]
    checkpoints = [folders[arm][0] / "latest" / "checkpoints" / "last.ckpt" for arm in arms]
    return [shlex.join(["rlmt", "chat", str(path), *prompt]) for path in checkpoints if path.exists()]


def _over_prompts(
    comparisons: Sequence[Comparison],
    metrics: Mapping[str, str],
    folders: Mapping[str, Mapping[int, Path]],
) -> dict[tuple[str, str, str | None], Interval]:
    """Intervals over prompts of the differences between arms that were evaluated on the same prompts."""
    found = {}
    for comparison in comparisons:
        more, than = (folders.get(name, {}) for name in (comparison.more, comparison.than))
        pairs = [(more[seed], than[seed]) for seed in more if seed in than]
        logged = metrics[comparison.by or next(iter(metrics))]
        if pairs and (over := interval_over_prompts(pairs, logged)) is not None:
            found[comparison.key] = over
    return found


def _samples(unfilled: Findings, folders: Mapping[str, Sequence[Path]]) -> list[str]:
    """Lines with the answers of the first arms that are compared, each in its run with the first seed."""
    compared = [arm for comparison in unfilled.comparisons for arm in (comparison.than, comparison.more)]
    first = [arm for arm in dict.fromkeys(compared) if folders.get(arm)][:_SAMPLED_ARMS]
    shown = [arm for arm in folders if arm in first]  # in the order of the table
    return list(
        sample_lines(answers_to_same_prompts({unfilled.labels[arm]: folders[arm][0] / "latest" for arm in shown}))
    )


def _draw(out: Path, title: str, curves: dict[str, list[list[Row]]]) -> Path:
    """Writes the figure of the study."""
    # Imported here because matplotlib takes a second to load.
    from rlmt.study.figure import draw_study

    return draw_study(out / "curves.png", title, curves)
