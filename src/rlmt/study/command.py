"""`rlmt study`: runs what is not done yet, then reports. It has no training loop: its jobs are `rlmt` commands."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from rich.console import Console

from rlmt.errors import UserError
from rlmt.study.report import Comparison, Findings, print_table, sentences, write_report
from rlmt.study.results import Estimate, Row, last_values, read_rows
from rlmt.study.runner import Runner, State
from rlmt.study.stages import Arm, Plan, Stage, keys


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
    only: list[str] | None = None,
    jobs: int = 1,
    command: str = "rlmt study",
) -> None:
    """Runs a study: the jobs that are not done yet, and a report over all.

    Args:
        stages: Name → what is run for each seed and each combination of axes.
        arms: Name → a row of the tables.
        metrics: Name → the name it is logged under; the first is the one that arms are judged by.
        out: Folder to write to; jobs that are done there are not run again.
        title: Heading of the report.
        seeds: Fixed before a run, all of them reported; null takes 0.
        texts: Name → text that several commands share.
        comparisons: Questions that the report answers.
        picture: Arms whose curves are drawn; null draws none.
        only: Arms to run and report; null takes all.
        jobs: Most jobs at a time, each on its share of the cores.
        command: How to make the report again, to be written into it.

    Raises:
        UserError: The study is not well put, or jobs failed.
    """
    seeds = seeds or [0]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {seeds}: one of them is there twice")
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}: give at least 1")
    for option, given in {"arms": arms, "metrics": metrics}.items():
        if not given:
            raise UserError(f"--{option}: name one at least")
    asked = comparisons or []
    _check_names("--only", only or [], "arm", arms)
    _check_names("--picture", picture or [], "arm", arms)
    _check_names("--comparisons", [name for it in asked for name in (it.more, it.than)], "arm", arms)
    _check_names("--comparisons", [it.by for it in asked if it.by is not None], "metric", metrics)
    chosen = {name: arm for name, arm in arms.items() if only is None or name in only}
    plan = Plan(stages, seeds, out, texts or {})
    needed = plan.needed(list(chosen.values()))
    signal.signal(signal.SIGTERM, _interrupt)
    Runner(needed, keys(needed, out), jobs).run()

    about = Findings(
        title=title,
        command=command,
        seeds=seeds,
        labels={name: arm.label for name, arm in chosen.items()},
        metrics=list(metrics),
        comparisons=asked,
    )
    report(plan, chosen, metrics, about, picture or [])


def report(plan: Plan, arms: dict[str, Arm], metrics: dict[str, str], about: Findings, picture: Sequence[str]) -> None:
    """Reads what the jobs logged, writes the report and prints its table and sentences.

    Args:
        plan: The jobs, all done.
        arms: Those to report.
        metrics: Name → the name it was logged under.
        about: All of the findings but what was found.
        picture: Arms to draw.

    Raises:
        UserError: A metric was not logged.
    """
    folders = {name: [plan.folder(arm, seed) for seed in plan.seeds] for name, arm in arms.items()}
    rows = {name: [read_rows(folder) for folder in found] for name, found in folders.items()}
    table = {}
    for name in arms:
        last = [
            last_values(*of_seed)
            for of_seed in zip(rows[name], [metrics] * len(plan.seeds), folders[name], strict=True)
        ]
        table[name] = {metric: Estimate(tuple(values[metric] for values in last)) for metric in metrics}
    drawn = {arms[name].label: rows[name] for name in picture if name in arms}
    found = replace(
        about,
        table=table,
        minutes={name: _minutes(found) for name, found in folders.items()},
        picture=_draw(plan.out, about.title, drawn) if drawn else None,
    )
    written = write_report(found, plan.out)
    console = Console()
    console.print(print_table(found))
    for sentence in sentences(found):
        console.print(sentence.replace("**", ""), soft_wrap=True, markup=False, highlight=False)
    for path in [*written, *([found.picture] if found.picture else [])]:
        console.print(str(path), soft_wrap=True, highlight=False)


def _check_names(option: str, names: Sequence[str], kind: str, known: Mapping[str, object]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{option}: there is no {kind} {name!r}; choose of {', '.join(known)}")


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Lets SIGTERM end the jobs, too."""
    raise SystemExit(128 + number)


def _minutes(folders: Sequence[Path]) -> Estimate:
    states = [State.load(folder) for folder in folders]
    return Estimate(tuple(sum(state.seconds.values()) / 60 for state in states if state is not None))


def _draw(out: Path, title: str, curves: dict[str, list[list[Row]]]) -> Path:
    # Imported here because matplotlib takes a second to load.
    from rlmt.study.figure import draw_study

    return draw_study(out / "curves.png", title, curves)
