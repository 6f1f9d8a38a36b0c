"""The parts of a study, and the expansion of its stages into jobs."""

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
"""Options added to every `fit`: the job's folder, and resuming from the last checkpoint."""
VALIDATE_OPTIONS = "--trainer.default_root_dir $dir"
"""Options added to every `validate`."""
_NAME = re.compile(r"[A-Za-z0-9_]+")
_MAX_TEXT_DEPTH = 8


@dataclass
class Stage:
    """Commands that run once for each seed and each combination of axis values.

    Args:
        run: Commands of `rlmt`, run in order. In a command `$seed` is the seed, `$dir` the job's folder, `$<axis>` the
            job's value on an axis, `$<stage>` the folder of another stage's job with the same values,
            `${<stage>.<value>}` the folder of the job with that value instead, and `$<text>` one of the study's texts.
            A `fit` writes to `$dir` and resumes from its last checkpoint; the options for that are added.
        each: Axis → its values.
    """

    run: list[str]
    each: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Arm:
    """A row of the result tables: one job of a stage per seed.

    Args:
        stage: The stage whose metrics are read.
        label: Label in tables and figures.
        where: Axis → value, for every axis of the stage.
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
    """(axis, value) pairs in the order of the stage's axes."""
    folder: Path
    commands: tuple[tuple[str, ...], ...]
    """Command lines without `rlmt`, each a tuple of words."""
    needs: tuple[Path, ...]
    """Folders of the jobs that must be done before this one."""

    @property
    def name(self) -> str:
        """Display name."""
        return " ".join([self.stage, *(value for _, value in self.values), f"seed {self.seed}"])


def job_folder(out: Path, stage: str, seed: int, values: Sequence[str]) -> Path:
    """Output folder of a job."""
    return out / f"seed-{seed}" / "-".join([stage, *values])


class _CommandTemplate(Template):
    """Placeholders in braces may contain dots: `${reward_model.weak}`."""

    idpattern = r"(?a:[_a-z][_a-z0-9]*)"
    braceidpattern = r"(?a:[_a-z][_a-z0-9]*(?:\.[_A-Za-z0-9]+)*)"


class Plan:
    """All jobs of a study, ordered so that each comes after the jobs that it depends on.

    Args:
        stages: Name → stage.
        seeds: Every stage is expanded for each seed.
        out: Folder of the study.
        texts: Name → text that several commands share; it may contain placeholders.

    Raises:
        UserError: A name is invalid or used twice, a placeholder is unknown, or stages depend on each other in a cycle.
    """

    def __init__(self, stages: Mapping[str, Stage], seeds: Sequence[int], out: Path, texts: Mapping[str, str]) -> None:
        self.stages, self.seeds, self.out, self.texts = dict(stages), list(seeds), out, dict(texts)
        self._check_names()
        self.jobs = _sort_by_dependency({job.folder: job for job in self._expand()})

    def _check_names(self) -> None:
        """Raises a UserError for an invalid or duplicate name and for a stage without commands."""
        axes = {axis for stage in self.stages.values() for axis in stage.each}
        for kind, names in (("stage", set(self.stages)), ("text", set(self.texts)), ("axis", axes)):
            for name in sorted(names):
                if not _NAME.fullmatch(name) or name != name.lower() or name in ("seed", "dir"):
                    raise UserError(
                        f"{kind} {name!r}: invalid name; use lower-case letters, digits and _, but not `seed` or `dir`."
                    )
        for name in axes & set(self.stages) | axes & set(self.texts) | set(self.stages) & set(self.texts):
            raise UserError(f"{name!r}: two of stages, axes and texts have this name; rename one of them.")
        for name, stage in self.stages.items():
            if not stage.run:
                raise UserError(f"stages.{name}.run: the list is empty; add at least one command.")
            for value in itertools.chain(*stage.each.values()):
                if not _NAME.fullmatch(value):
                    raise UserError(
                        f"stages.{name}.each: invalid value {value!r}; use letters, digits and _, because values "
                        "become folder names."
                    )

    def _expand(self) -> Iterator[Job]:
        """Yields one job for each seed, stage and combination of axis values."""
        for seed in self.seeds:
            for name, stage in self.stages.items():
                for values in itertools.product(*stage.each.values()):
                    yield self._job(name, stage, seed, dict(zip(stage.each, values, strict=True)))

    def _job(self, name: str, stage: Stage, seed: int, values: dict[str, str]) -> Job:
        """The job of a stage, with all placeholders substituted."""
        folder = job_folder(self.out, name, seed, list(values.values()))
        needs: dict[Path, None] = {}
        commands = []
        for line in stage.run:
            words = shlex.split(self._with_texts(line, name))
            words += {"fit": FIT_OPTIONS, "validate": VALIDATE_OPTIONS}.get(words[0] if words else "", "").split()
            known = {"seed": str(seed), "dir": str(folder), **values}
            commands.append(tuple(self._substitute(word, name, known, seed, values, needs) for word in words))
        return Job(name, seed, tuple(values.items()), folder, tuple(commands), tuple(needs))

    def _with_texts(self, line: str, stage: str) -> str:
        """The command line with the study's texts inserted."""
        for _ in range(_MAX_TEXT_DEPTH):
            names = [name for name in _CommandTemplate(line).get_identifiers() if name in self.texts]
            if not names:
                return line
            line = _CommandTemplate(line).safe_substitute({name: self.texts[name] for name in names})
        raise UserError(f"stages.{stage}.run: its texts contain each other; remove the cycle.")

    def _substitute(
        self, word: str, stage: str, known: dict[str, str], seed: int, values: dict[str, str], needs: dict[Path, None]
    ) -> str:
        """The word with its placeholders substituted; adds the folders that it refers to to `needs`."""
        replacements = dict(known)
        for name in _CommandTemplate(word).get_identifiers():
            if name in replacements:
                continue
            folder = self._referenced_folder(name, stage, seed, values)
            needs[folder] = None
            replacements[name] = str(folder)
        return _CommandTemplate(word).substitute(replacements)

    def _referenced_folder(self, reference: str, stage: str, seed: int, values: dict[str, str]) -> Path:
        """The folder that `$name` or `${name.value}` refers to in a job with these values."""
        name, *selected = reference.split(".")
        if name not in self.stages:
            raise UserError(
                f"stages.{stage}.run: unknown placeholder ${reference}; use a stage, an axis of this stage, or a text."
            )
        resolved = []
        for axis, options in self.stages[name].each.items():
            matching = [value for value in selected if value in options]
            if not matching and values.get(axis) not in options:
                raise UserError(
                    f"stages.{stage}.run: ${reference} does not select a value of the axis {axis} "
                    f"({', '.join(options)}); write for example ${{{reference}.{options[0]}}}."
                )
            resolved.append(matching[0] if matching else values[axis])
        if unknown := [value for value in selected if value not in resolved]:
            raise UserError(f"stages.{stage}.run: ${reference}: the stage {name} has no value {unknown[0]!r}.")
        return job_folder(self.out, name, seed, resolved)

    def jobs_for(self, arms: Sequence[Arm]) -> list[Job]:
        """Returns the jobs of some arms and every job that they depend on, in order.

        Args:
            arms: The arms.

        Returns:
            The jobs of all seeds.

        Raises:
            UserError: An arm has an unknown stage or value.
        """
        needed = {self.folder(arm, seed) for arm in arms for seed in self.seeds}
        for job in reversed(self.jobs):
            if job.folder in needed:
                needed.update(job.needs)
        return [job for job in self.jobs if job.folder in needed]

    def folder(self, arm: Arm, seed: int) -> Path:
        """Returns the folder of an arm's job.

        Args:
            arm: The arm.
            seed: The seed.

        Returns:
            The folder.

        Raises:
            UserError: The arm has an unknown stage or value.
        """
        stage = self.stages.get(arm.stage)
        if stage is None:
            raise UserError(f"arm {arm.label!r}: unknown stage {arm.stage!r}; choose from {', '.join(self.stages)}.")
        if set(arm.where) != set(stage.each) or any(arm.where[axis] not in stage.each[axis] for axis in stage.each):
            raise UserError(
                f"arm {arm.label!r}: `where` must have exactly one value for each axis of {arm.stage}: {stage.each}."
            )
        return job_folder(self.out, arm.stage, seed, [arm.where[axis] for axis in stage.each])


def _sort_by_dependency(jobs: Mapping[Path, Job]) -> list[Job]:
    """Depth-first topological sort: the jobs that a job depends on come right before it."""
    ordered: list[Job] = []
    done: set[Path] = set()
    visiting: set[Path] = set()

    def visit(folder: Path) -> None:
        if folder in visiting:
            raise UserError(f"stages: the stage {jobs[folder].stage} depends on itself; remove the cycle.")
        if folder in done:
            return
        visiting.add(folder)
        for need in jobs[folder].needs:
            visit(need)
        visiting.remove(folder)
        done.add(folder)
        ordered.append(jobs[folder])

    for folder in jobs:
        visit(folder)
    return ordered


def job_digests(jobs: Sequence[Job], out: Path) -> dict[Path, str]:
    """Hashes everything that the files of a job depend on.

    That is: the version of rlmt, the commands, the contents of the configs that they name, and the digests of the jobs
    that come first.

    Args:
        jobs: The jobs in order, with every job that they depend on.
        out: Folder of the study. Its path is left out of the digest, so a study can be moved.

    Returns:
        Folder of each job → its digest.
    """
    digests: dict[Path, str] = {}
    for job in jobs:
        digest = hashlib.sha256(__version__.encode())
        for command in job.commands:
            digest.update(repr([word.replace(str(out), "") for word in command]).encode())
            for path in _config_files(command):
                digest.update(path.read_bytes())
        for need in job.needs:
            digest.update(digests[need].encode())
        digests[job.folder] = digest.hexdigest()[:16]
    return digests


def _config_files(command: Sequence[str]) -> list[Path]:
    """The files that a command's `--config` options name."""
    resolved = resolve_configs(command)
    return [Path(value) for option, value in itertools.pairwise(resolved) if option in ("--config", "-c")]
