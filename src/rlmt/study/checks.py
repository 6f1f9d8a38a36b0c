"""Checks of the options of `rlmt study`, before any job runs."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence

from rlmt.errors import UserError
from rlmt.study.findings import Comparison


def check_options(
    seeds: Sequence[int],
    arms: Mapping[str, object],
    metrics: Mapping[str, object],
    tables: Mapping[str, Sequence[str]],
) -> None:
    """Raises a UserError for duplicate seeds, a study without arms or metrics, and tables of unknown arms."""
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {list(seeds)}: a seed occurs twice; pass each seed once.")
    for option, entries in {"arms": arms, "metrics": metrics}.items():
        if not entries:
            raise UserError(f"--{option}: no entries; define at least one.")
    check_names("--tables", [arm for members in tables.values() for arm in members], "arm", arms)
    if both := set(tables) & set(arms):
        raise UserError(f"--tables: {min(both)!r} is also an arm; rename the table.")


def check_executor(executor: str) -> None:
    """Raises a UserError if the machine cannot submit jobs to SLURM, or has not the extra for it."""
    if executor != "slurm":
        return
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        raise UserError("--executor slurm: Snakemake's executor is not installed; run pip install 'rlmt[slurm]'.")
    if shutil.which("sbatch") is None:
        raise UserError("--executor slurm: this machine has no sbatch; start the study on a login node of the cluster.")


def check_names(option: str, names: Sequence[str], kind: str, known: Mapping[str, object]) -> None:
    """Raises a UserError for the first unknown name."""
    for name in names:
        if name not in known:
            raise UserError(f"{option}: unknown {kind} {name!r}; choose from {', '.join(known)}.")


def check_comparisons(
    comparisons: Sequence[Comparison], arms: Mapping[str, object], metrics: Mapping[str, object]
) -> None:
    """Raises a UserError for a comparison of unknown arms or by an unknown metric."""
    check_names("--comparisons", [name for it in comparisons for name in (it.more, it.than)], "arm", arms)
    check_names("--comparisons", [it.by for it in comparisons if it.by is not None], "metric", metrics)


def texts_of_scale(scale: str | None, scales: Mapping[str, dict[str, str]]) -> dict[str, str]:
    """Returns the texts of a scale, none for a study without scales.

    Args:
        scale: Name of the scale.
        scales: The scales of the study.

    Raises:
        UserError: The scale is unknown, or the study has none.
    """
    if scale is None and not scales:
        return {}
    if scale is None or scale not in scales:
        hint = f"choose from {', '.join(scales)}" if scales else "the study has none, so leave the option out"
        raise UserError(f"--scale {scale}: no such scale; {hint}.")
    return dict(scales[scale])
