"""The checkpoint that `--ckpt_path last` stands for: the newest one of the same run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlmt.checkpointing.config_changes import CONFIG_FILE, config_changes, same_run

CHECKPOINT = Path("checkpoints", "last.ckpt")
"""Path of the newest checkpoint in a run's folder `version_N`."""


def last_checkpoint(root: Path, config: Mapping[str, Any]) -> Path | None:
    """Finds the newest checkpoint of the run that a configuration defines.

    Among the runs in a folder, those whose options are all the same come first. Next are those with the same seed,
    module, model, objective and thinking format: of these, options have been changed.

    Args:
        root: Folder with the `version_N` of several runs.
        config: Configuration of the run, as plain data.

    Returns:
        Path of the checkpoint; None if there is none of this run.
    """
    newest_first = sorted(checkpoints(root), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    candidates = {path: _config_of(path) for path in newest_first}
    equal = [path for path, before in candidates.items() if not config_changes(before, config)]
    same = [path for path, before in candidates.items() if same_run(before, config)]
    return next(iter([*equal, *same]), None)


def checkpoints(root: Path) -> list[Path]:
    """The newest checkpoint of each run in a folder."""
    return sorted(root.glob(f"version_*/{CHECKPOINT}"))


def _config_of(checkpoint: Path) -> dict[str, Any]:
    """The configuration of the run that wrote a checkpoint."""
    path = checkpoint.parents[1] / CONFIG_FILE
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return config
