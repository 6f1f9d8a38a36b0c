"""The parts of a study: stages, from which Snakemake makes its jobs, and the arms that are reported."""

from __future__ import annotations

import hashlib
import itertools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from rlmt.configs import find_config
from rlmt.errors import UserError

STUDY = "$study"
"""Stands for the study's folder in a command, so that a study that was moved has the same commands."""
DONE = "done"
"""File in the folder of a job that is done."""
_OPTIONS = {
    "fit": "--trainer.default_root_dir $dir --ckpt_path last",
    **dict.fromkeys(("validate", "predict"), "--trainer.default_root_dir $dir"),
}
"""Options added to commands: the job's folder, and resuming from the last checkpoint."""
_CONFIG_OPTIONS = ("--config", "-c")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_VALUE = re.compile(r"[A-Za-z0-9_]+")
_RESERVED = ("seed", "dir", "study")
_MAX_TEXT_DEPTH = 8


@dataclass
class Stage:
    """A command that runs once for each seed and each combination of axis values: a rule of Snakemake.

    Args:
        run: The command, without `rlmt`. In it `$seed` is the seed, `$dir` the job's folder, `$<axis>` the job's value
            on an axis, `$<need>` the folder of a job that it needs, and `$<text>` one of the study's texts. A `fit`
            writes to `$dir` and resumes from its last checkpoint; the options for that are added.
        each: Axis → its values.
        needs: Name → a job of the same seed that comes first: `<stage>-<value>-<value>`, with one value for each axis
            of its stage, in order; `$<axis>` is this job's value.
        resources: What a job needs on a cluster, in the words of Snakemake: gpu, runtime (minutes), mem_mb, …
    """

    run: str
    each: dict[str, list[str]] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)
    resources: dict[str, int | str] = field(default_factory=dict)


@dataclass
class Arm:
    """A row of the result tables: one job of a stage per seed.

    Args:
        stage: The stage whose metrics are read.
        label: Label in tables and figures.
        where: Axis → value, for every axis of the stage.
        paper: Metric → its value in a paper, which the report shows beside.
    """

    stage: str
    label: str
    where: dict[str, str] = field(default_factory=dict)
    paper: dict[str, float] = field(default_factory=dict)


class Plan:
    """The stages of a study, checked; every job is a folder in the study's folder.

    Args:
        stages: Name → stage.
        texts: Name → text that several commands share; it may contain placeholders.

    Raises:
        UserError: A name is invalid or used twice, a placeholder is unknown, or a need names no job.
    """

    def __init__(self, stages: Mapping[str, Stage], texts: Mapping[str, str]) -> None:
        self.stages, self.texts = dict(stages), dict(texts)
        self._check_names()
        self._lines = {name: self.with_texts(stage.run, f"stages.{name}.run") for name, stage in self.stages.items()}
        for name, stage in self.stages.items():
            self._check_needs(name, stage)
            self._check_placeholders(name, stage)

    def check_configs(self, folder: Path) -> None:
        """Raises a UserError for a command that names a config that does not exist.

        Args:
            folder: Folder in which the commands run.
        """
        for stage, values in self.jobs(0):
            digest_configs(self.command(stage, values), folder)

    def jobs(self, seed: int) -> Iterator[tuple[str, dict[str, str]]]:
        """Yields the stage and the values of each job of a seed: `seed` and every axis of the stage.

        Args:
            seed: The seed.
        """
        for name, stage in self.stages.items():
            for values in itertools.product(*stage.each.values()):
                yield name, {"seed": str(seed), **dict(zip(stage.each, values, strict=True))}

    def _check_names(self) -> None:
        """Raises a UserError for an invalid or duplicate name or value."""
        axes = {axis for stage in self.stages.values() for axis in stage.each}
        needs = {need for stage in self.stages.values() for need in stage.needs}
        for kind, names in (("stage", set(self.stages)), ("text", set(self.texts)), ("axis", axes), ("need", needs)):
            for name in sorted(names):
                if not _NAME.fullmatch(name) or name in _RESERVED:
                    raise UserError(
                        f"{kind} {name!r}: invalid name; use lower-case letters, digits and _, but none of "
                        f"{', '.join(_RESERVED)}."
                    )
        for name in axes & set(self.texts) | axes & needs | needs & set(self.texts):
            raise UserError(f"{name!r}: two of axes, needs and texts have this name; rename one of them.")
        for name, stage in self.stages.items():
            if not stage.run.strip():
                raise UserError(f"stages.{name}.run: the command is empty; write one, without `rlmt`.")
            for value in itertools.chain(*stage.each.values()):
                if not _VALUE.fullmatch(value):
                    raise UserError(
                        f"stages.{name}.each: invalid value {value!r}; use letters, digits and _, because values "
                        "become folder names."
                    )

    def _check_needs(self, name: str, stage: Stage) -> None:
        """Raises a UserError for a need that names no job."""
        for need, job in stage.needs.items():
            option = f"stages.{name}.needs.{need}"
            needed, *values = job.split("-")
            if needed not in self.stages:
                raise UserError(f"{option}: unknown stage {needed!r}; choose from {', '.join(self.stages)}.")
            axes = self.stages[needed].each
            if len(values) != len(axes):
                example = "-".join([needed, *(f"${axis}" for axis in axes)])
                raise UserError(f"{option}: {job!r} has {len(values)} values, not {len(axes)}; write {example!r}.")
            for value, (axis, options) in zip(values, axes.items(), strict=True):
                mine = stage.each.get(value[1:], []) if value.startswith("$") else [value]
                if not mine or not set(mine) <= set(options):
                    raise UserError(
                        f"{option}: {value!r} is no value of the axis {axis} of {needed}; choose from "
                        f"{', '.join(options)}, or an axis of {name} with such values."
                    )

    def _check_placeholders(self, name: str, stage: Stage) -> None:
        """Raises a UserError for an unknown placeholder, or if the command is no valid one."""
        known = dict.fromkeys(("seed", "dir", *stage.each, *stage.needs), "")
        try:
            Template(self._lines[name]).substitute(known)
        except (KeyError, ValueError) as error:
            what = f"unknown placeholder ${error.args[0]}" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"stages.{name}.run: {what}; use $seed, $dir, an axis or a need of this stage, or a text."
            ) from error

    def with_texts(self, line: str, option: str) -> str:
        """Returns a command line with the study's texts inserted.

        Args:
            line: The command line.
            option: Where it comes from, for messages.

        Raises:
            UserError: The texts contain each other.
        """
        for _ in range(_MAX_TEXT_DEPTH):
            if not set(Template(line).get_identifiers()) & set(self.texts):
                return line
            line = Template(line).safe_substitute(self.texts)
        raise UserError(f"{option}: its texts contain each other; remove the cycle.")

    def command(self, stage: str, values: Mapping[str, str]) -> str:
        """Returns the command of a job, with `$study` for the study's folder.

        Args:
            stage: The stage.
            values: `seed` and each axis of the stage → value, and no more.

        Returns:
            The command line without `rlmt`, quoted for a shell.
        """
        seed = values["seed"]
        folders = {need: self._folder(job, values) for need, job in self.stages[stage].needs.items()}
        folders["dir"] = f"{STUDY}/seed-{seed}/{'-'.join([stage, *(values[axis] for axis in self.stages[stage].each)])}"
        words = shlex.split(self._lines[stage])
        words += _OPTIONS.get(words[0], "").split()
        return shlex.join(Template(word).substitute(values, **folders) for word in words)

    @staticmethod
    def _folder(job: str, values: Mapping[str, str]) -> str:
        """Folder of a needed job."""
        return f"{STUDY}/seed-{values['seed']}/{Template(job).substitute(values)}"

    def inputs(self, stage: str) -> dict[str, str]:
        """Returns need → pattern of the file that shows that it is done, with Snakemake's wildcards.

        Args:
            stage: The stage.
        """
        axes = {axis: f"{{{axis}}}" for axis in self.stages[stage].each}
        needs = self.stages[stage].needs.items()
        return {need: f"seed-{{seed}}/{Template(job).substitute(axes)}/{DONE}" for need, job in needs}

    def output(self, stage: str) -> str:
        """Returns the pattern of the file that shows that a job is done, with Snakemake's wildcards.

        Args:
            stage: The stage.
        """
        return f"seed-{{seed}}/{'-'.join([stage, *(f'{{{axis}}}' for axis in self.stages[stage].each)])}/{DONE}"

    def program(self, stage: str) -> str:
        """Returns the name of a stage's command, such as `fit`.

        Args:
            stage: The stage.
        """
        return shlex.split(self._lines[stage])[0]

    def training_folder(self, arm: Arm, seed: int) -> Path:
        """Returns the folder of an arm's training run: of the job that it needs if that trains and its own does not.

        Args:
            arm: The arm.
            seed: The seed.

        Returns:
            The folder, relative to the study's.
        """
        if self.program(arm.stage) != "fit":
            for job in self.stages[arm.stage].needs.values():
                if self.program(job.partition("-")[0]) == "fit":
                    return Path(f"seed-{seed}") / Template(job).substitute(arm.where)
        return self.folder(arm, seed)

    def folder(self, arm: Arm, seed: int) -> Path:
        """Returns the folder of an arm's job, relative to the study's.

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
        return Path(self.output(arm.stage).format(seed=seed, **arm.where)).parent


def digest_configs(command: str, folder: Path) -> str:
    """Hashes the contents of the configs that a command names, so that a change of one changes the job.

    Args:
        command: The command line without `rlmt`.
        folder: Folder in which the command runs.

    Returns:
        A hexadecimal digest.

    Raises:
        UserError: There is neither a file nor a shipped config with a name.
    """
    digest = hashlib.sha256()
    words = [part for word in shlex.split(command) for part in _option_and_value(word)]
    for option, value in itertools.pairwise(words):
        if option in _CONFIG_OPTIONS:
            path = folder / value
            digest.update((path if path.is_file() else Path(find_config(value))).read_bytes())
    return digest.hexdigest()[:16]


def _option_and_value(word: str) -> list[str]:
    """`--config=x` as two words; other words as they are."""
    return word.split("=", 1) if word.startswith(tuple(f"{option}=" for option in _CONFIG_OPTIONS)) else [word]


def job_name(folder: Path) -> str:
    """Display name of a job: `rl think grpo seed 1`.

    Args:
        folder: Folder of the job.
    """
    return f"{folder.name.replace('-', ' ')} {folder.parent.name.replace('-', ' ')}"


def target_files(plan: Plan, arms: Sequence[Arm], seeds: Sequence[int]) -> list[str]:
    """Returns the files that Snakemake has to make for some arms.

    Args:
        plan: The plan.
        arms: The arms.
        seeds: The seeds.

    Raises:
        UserError: An arm has an unknown stage or value.
    """
    return [str(plan.folder(arm, seed) / DONE) for seed in seeds for arm in arms]
