"""Scores of both policies' responses by a reward, kept in a file so that a run that was stopped continues."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from rlmt.checkpointing.files import atomic_write
from rlmt.errors import UserError
from rlmt.evaluation.compare.pairs import Pair
from rlmt.evaluation.statistics import Floats
from rlmt.rewards import CallableReward, Reward, WeightedSum, score
from rlmt.rewards.base import all_rewards

BATCH = 64
"""Pairs that are scored together; the file is written after each batch."""

_KEY = b"rlmt.key"


def check_reward(reward: Reward) -> None:
    """Checks a reward before any weights are loaded.

    Raises:
        UserError: The reward is invalid, or its scores depend on what else is in a batch.
    """
    for inner in all_rewards(reward):
        if isinstance(inner, WeightedSum) and set(inner.scale) != {"none"}:
            raise UserError(
                f"--rewards: WeightedSum {inner.name!r} divides scores by their spread over a training batch; set its "
                "scale to none, or list its parts as rewards of their own."
            )
    reward.check()


def score_pairs(reward: Reward, pairs: Sequence[Pair], path: Path, device: str) -> tuple[Floats, Floats]:
    """Scores the responses of all well-formed pairs; malformed completions are not scored.

    Both responses to a prompt are in one batch, so a reward that compares the responses to a prompt compares them.

    Args:
        reward: A checked reward. It is loaded if scores are missing.
        pairs: n pairs.
        path: Parquet file of the scores. Those in it are not computed again, unless the reward or a text has changed,
            or the reward runs the user's own code.
        device: Device for the reward's weights.

    Returns:
        [n] scores of A and [n] of B, nan in pairs that are not well formed and where a reward that asks has no verdict.

    Raises:
        UserError: The reward raises one.
    """
    rows = [number for number, pair in enumerate(pairs) if pair.well_formed]
    key = _fingerprint(reward, [pairs[number] for number in rows])
    scores = [] if _runs_own_code(reward) else _read(path, key)
    batches = [rows[start : start + BATCH] for start in range(len(scores), len(rows), BATCH)]
    if batches:
        what = f"score by {escape(reward.name)}"
        reward.load()
        try:
            reward.to(device)
            for batch in track(batches, what, console=Console(stderr=True), transient=True):
                scores += _score_batch(reward, [pairs[number] for number in batch])
                _write(path, key, scores)
        finally:
            reward.close()
            reward.to("cpu")
    table = np.full((len(pairs), 2), np.nan)
    table[rows] = np.array(scores, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _score_batch(reward: Reward, pairs: Sequence[Pair]) -> list[list[float]]:
    """The scores of A and B in each pair."""
    splits = [split for pair in pairs for split in (pair.first, pair.second)]
    prompts = [pair.prompt for pair in pairs for _ in range(2)]
    with torch.inference_mode():
        scores = score(reward, prompts, splits, [split.response for split in splits])
    unparsed = scores.parts.get(f"{reward.name}_unparsed", torch.zeros(len(splits)))
    return cast(list[list[float]], scores.total.where(unparsed < 1, torch.nan).reshape(-1, 2).tolist())


def _fingerprint(reward: Reward, pairs: Sequence[Pair]) -> str:
    """A hash of the options of a reward, the files in the folders that they name, and the texts that it scores."""
    options = describe_reward(reward)
    names = [value for each in options for value in each.values() if isinstance(value, str)]
    folders = [Path(name) for name in names if os.path.isdir(name)]  # Path.is_dir raises on long texts
    files = [(file.name, file.stat()) for path in folders for file in sorted(path.iterdir())]
    texts = [[pair.prompt.messages, pair.prompt.extra, pair.first.response, pair.second.response] for pair in pairs]
    states = [[name, state.st_size, state.st_mtime_ns] for name, state in files]
    return blake2b(json.dumps([options, states, texts]).encode(), digest_size=16).hexdigest()


def describe_reward(reward: Reward) -> list[dict[str, Any]]:
    """Class and options of a reward and of those inside it, as JSON values."""
    found = [
        {"class": f"{type(each).__module__}.{type(each).__qualname__}"}
        | {name: value for name, value in vars(each).items() if name[:1] != "_" and name not in ("training", "resume")}
        for each in all_rewards(reward)
    ]
    return cast(list[dict[str, Any]], json.loads(json.dumps(found, default=_as_json)))


def _as_json(value: Any) -> Any:
    """An option that is no JSON value."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _runs_own_code(reward: Reward) -> bool:
    """Whether a reward runs code of the user, which may change while the options stay the same."""
    return any(
        isinstance(each, CallableReward) or not type(each).__module__.startswith("rlmt.")
        for each in all_rewards(reward)
    )


def _read(path: Path, key: str) -> list[list[float]]:
    """Scores in the file, if it has those of this reward and these texts."""
    if not path.is_file():
        return []
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: is not a readable parquet file; remove it.") from error
    if (table.schema.metadata or {}).get(_KEY) != key.encode():
        return []
    return [[row["a"], row["b"]] for row in table.to_pylist()]


def _write(path: Path, key: str, scores: Sequence[Sequence[float]]) -> None:
    """Replaces the file."""
    columns = {"a": [row[0] for row in scores], "b": [row[1] for row in scores]}
    table = pyarrow.table(columns, pyarrow.schema([("a", pyarrow.float64()), ("b", pyarrow.float64())]))
    with atomic_write(path) as unfinished:
        pyarrow.parquet.write_table(table.replace_schema_metadata({_KEY: key}), unfinished)
