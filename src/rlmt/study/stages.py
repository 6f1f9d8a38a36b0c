"""What a study is made of, and the jobs that its stages come to."""

from __future__ import annotations

import hashlib
import itertools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from rlmt import __version__
from rlmt.configs import resolve_configs
from rlmt.errors import UserError

FIT_OPTIONS = "--trainer.default_root_dir $dir --ckpt_path last"
"""What every `fit` is given: its folder, and that it goes on where it stopped."""
_FOLDER_OPTION = "--trainer.default_root_dir $dir"
_SAFE = re.compile(r"[A-Za-z0-9_]+")


@dataclass
class Stage:
    """One step of the study, done once for each seed and each combination of its axes.

    Args:
        run: commands of `rlmt`, one after the other. In them `$seed` is the seed, `$dir` the job's folder, `$<axis>`
            its value on an axis, `$<stage>` the folder of another stage's job with the same values, and
            `${<stage>.<value>}` the one with that value in place of its own; `$<text>` is one of the study's texts.
            A `fit` writes to `$dir` and goes on from its last checkpoint without being told.
        each: axis → its values.
    """

    run: list[str]
    each: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Arm:
    """A row of the tables: one job of each seed.

    Args:
        stage: the stage whose metrics are read.
        label: what people call it.
        where: axis → value, for each axis of the stage.
    """

    stage: str
    label: str
    where: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """The commands of one stage for one seed and one value of each axis."""

    stage: str
    seed: int
    values: tuple[tuple[str, str], ...]
    """(axis, value) in the order of the stage's axes."""
    folder: Path
    commands: tuple[tuple[str, ...], ...]
    """Each a command line without `rlmt`."""
    needs: tuple[Path, ...]
    """Folders of the jobs that come first."""

    @property
    def name(self) -> str:
        """For people."""
        return " ".join([self.stage, *(value for _, value in self.values), f"seed {self.seed}"])


def job_folder(out: Path, stage: str, seed: int, values: Sequence[str]) -> Path:
    """Where a job writes."""
    return out / f"seed-{seed}" / "-".join([stage, *values])


class _Text(Template):
    """Placeholders may have dots: `${judge.weak}`."""

    idpattern = r"(?a:[_a-z][_a-z0-9]*)"
    braceidpattern = r"(?a:[_a-z][_a-z0-9]*(?:\.[_A-Za-z0-9]+)*)"


class Plan:
    """All jobs of a study, in an order in which each comes after what it needs.

    Args:
        stages: name → stage.
        seeds: one set of jobs for each.
        out: folder of the study.
        texts: name → text that several commands share, with placeholders of its own.

    Raises:
        UserError: a name is no plain word or taken, a placeholder stands for nothing, or stages need one another.
    """

    def __init__(self, stages: Mapping[str, Stage], seeds: Sequence[int], out: Path, texts: Mapping[str, str]) -> None:
        self.stages, self.seeds, self.out, self.texts = dict(stages), list(seeds), out, dict(texts)
        self._check_names()
        jobs = {job.folder: job for job in self._expand()}
        self.jobs: list[Job] = []
        self._order(jobs)

    def _check_names(self) -> None:
        axes = {axis for stage in self.stages.values() for axis in stage.each}
        for kind, names in (("stage", set(self.stages)), ("text", set(self.texts)), ("axis", axes)):
            for name in sorted(names):
                if not _SAFE.fullmatch(name) or name != name.lower() or name in ("seed", "dir"):
                    raise UserError(f"{kind} {name!r}: use lower-case letters, digits and _, and neither seed nor dir")
        for name in axes & set(self.stages) | axes & set(self.texts) | set(self.stages) & set(self.texts):
            raise UserError(f"{name!r} is the name of two things among stages, axes and texts: rename one")
        for name, stage in self.stages.items():
            if not stage.run:
                raise UserError(f"stages.{name}.run is empty: give it commands")
            for value in itertools.chain(*stage.each.values()):
                if not _SAFE.fullmatch(value):
                    raise UserError(
                        f"stages.{name}.each: {value!r} is no plain word, which names of folders have to be"
                    )

    def _expand(self) -> Iterator[Job]:
        for seed in self.seeds:
            for name, stage in self.stages.items():
                for values in itertools.product(*stage.each.values()):
                    yield self._job(name, stage, seed, dict(zip(stage.each, values, strict=True)))

    def _job(self, name: str, stage: Stage, seed: int, values: dict[str, str]) -> Job:
        folder = job_folder(self.out, name, seed, list(values.values()))
        needs: dict[Path, None] = {}
        commands = []
        for line in stage.run:
            words = shlex.split(self._with_texts(line, name))
            words += {"fit": FIT_OPTIONS, "validate": _FOLDER_OPTION}.get(words[0] if words else "", "").split()
            scope = {"seed": str(seed), "dir": str(folder), **values}
            commands.append(tuple(self._fill(word, name, scope, seed, values, needs) for word in words))
        return Job(name, seed, tuple(values.items()), folder, tuple(commands), tuple(needs))

    def _with_texts(self, line: str, stage: str) -> str:
        for _ in range(8):
            names = [name for name in _Text(line).get_identifiers() if name in self.texts]
            if not names:
                return line
            line = _Text(line).safe_substitute({name: self.texts[name] for name in names})
        raise UserError(f"stages.{stage}.run: its texts hold one another")

    def _fill(
        self, word: str, stage: str, scope: dict[str, str], seed: int, values: dict[str, str], needs: dict[Path, None]
    ) -> str:
        found = dict(scope)
        for name in _Text(word).get_identifiers():
            if name in found:
                continue
            folder = self._folder_of(name, stage, seed, values)
            needs[folder] = None
            found[name] = str(folder)
        return _Text(word).substitute(found)

    def _folder_of(self, reference: str, stage: str, seed: int, values: dict[str, str]) -> Path:
        """The folder that `$name` or `${name.value}` stands for in a job with these values."""
        name, *chosen = reference.split(".")
        if name not in self.stages:
            raise UserError(f"stages.{stage}.run: ${reference} is neither a stage, an axis of this one, nor a text")
        theirs = []
        for axis, options in self.stages[name].each.items():
            picked = [value for value in chosen if value in options]
            if not picked and values.get(axis) not in options:
                raise UserError(
                    f"stages.{stage}.run: ${reference} does not say which {axis} of {', '.join(options)}: write "
                    f"${{{reference}.{options[0]}}} for one"
                )
            theirs.append(picked[0] if picked else values[axis])
        if unknown := [value for value in chosen if value not in theirs]:
            raise UserError(f"stages.{stage}.run: ${reference}: the stage {name} has no {unknown[0]!r}")
        return job_folder(self.out, name, seed, theirs)

    def _order(self, jobs: dict[Path, Job]) -> None:
        """Depth first, so that a stage's jobs come right before what needs them; `jobs` is emptied."""
        on_the_way: set[Path] = set()

        def visit(folder: Path) -> None:
            if folder in on_the_way:
                raise UserError(f"stages: {jobs[folder].stage} needs itself by way of other stages")
            if folder in done:
                return
            on_the_way.add(folder)
            for need in jobs[folder].needs:
                visit(need)
            on_the_way.remove(folder)
            done.add(folder)
            self.jobs.append(jobs[folder])

        done: set[Path] = set()
        for folder in jobs:
            visit(folder)

    def needed(self, arms: Sequence[Arm]) -> list[Job]:
        """The jobs behind some arms, in order.

        Raises:
            UserError: an arm names a stage or a value that there is not.
        """
        wanted = {self.folder(arm, seed) for arm in arms for seed in self.seeds}
        for job in reversed(self.jobs):
            if job.folder in wanted:
                wanted.update(job.needs)
        return [job for job in self.jobs if job.folder in wanted]

    def folder(self, arm: Arm, seed: int) -> Path:
        """The folder of an arm's job.

        Raises:
            UserError: the arm names a stage or a value that there is not.
        """
        stage = self.stages.get(arm.stage)
        if stage is None:
            raise UserError(f"arm {arm.label!r}: there is no stage {arm.stage!r}")
        if set(arm.where) != set(stage.each) or any(arm.where[axis] not in stage.each[axis] for axis in stage.each):
            raise UserError(
                f"arm {arm.label!r}: `where` has to give one value of each axis of {arm.stage}: {stage.each}"
            )
        return job_folder(self.out, arm.stage, seed, [arm.where[axis] for axis in stage.each])


def keys(jobs: Sequence[Job], out: Path) -> dict[Path, str]:
    """A digest of all that a job's files depend on: its commands, the configs they name, and what comes first.

    Args:
        jobs: in order, with all that they need.
        out: the study's folder, whose own name does not count.
    """
    found: dict[Path, str] = {}
    for job in jobs:
        digest = hashlib.sha256(__version__.encode())
        for command in job.commands:
            digest.update(repr([word.replace(str(out), "") for word in command]).encode())
            for path in _configs(command):
                digest.update(path.read_bytes())
        for need in job.needs:
            digest.update(found[need].encode())
        found[job.folder] = digest.hexdigest()[:16]
    return found


def _configs(command: Sequence[str]) -> list[Path]:
    resolved = resolve_configs(command)
    return [Path(word) for before, word in itertools.pairwise(resolved) if before in ("--config", "-c")]
