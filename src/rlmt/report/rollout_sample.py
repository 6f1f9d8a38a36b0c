"""The rollouts on a page: a seeded sample, stratified by step, and the ones that a reader looks for.

Rollouts of validation are followed over the steps, since their prompts are the same each time; the sample, the best
and the worst are of training. A full run has more text than a page can hold, so the texts have a budget of bytes,
measured compressed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rlmt.engines.rollout_files import read_rollouts

NUMBERS = ["step", "group", "sample", "rank", "prompt_index", "status", "truncated", "thought_tokens",
           "response_tokens", "reward"]  # fmt: skip
"""Columns that are read for every rollout; texts are read for the chosen ones alone."""
TEXTS = ["messages", "text", "thought", "response", "reward_parts"]
MAX_CHARS = 12_000
"""Longest text of one field; the middle of a longer one is omitted."""
_VALIDATION = "val_rollouts"
_EXTREMES, _MALFORMED, _FOLLOWED, _FOLLOWED_STEPS, _STRATIFIED = 30, 60, 16, 8, 600
"""Best and worst samples each; malformed ones; prompts that are followed over steps, and steps of each; others."""

Row = dict[str, Any]


@dataclass
class Picked:
    """The chosen rollouts of one run."""

    rows: list[Row] = field(default_factory=list)
    """One dict a rollout: numbers, texts, `kinds` (why it was chosen) and `prompt` (position in `prompts`)."""
    prompts: list[Row] = field(default_factory=list)
    """`index` in the prompt set, see `numbers`, and `messages` as [role, content]."""
    total: int = 0
    """Rollouts of the run."""


def numbers(folder: Path) -> dict[str, Any]:
    """Reads the numbers of all rollouts of a run.

    Args:
        folder: The run's folder.

    Returns:
        Column → array in the order of the files, with `held_out`: whether a validation generated it. The index of a
        held-out prompt is -1 - its row, since both prompt sets count from 0.
    """
    files = rollout_files(folder)
    tables = [read_rollouts(file, NUMBERS) for file in files]
    columns = {name: pa.concat_tables(tables)[name].to_numpy(zero_copy_only=False) for name in NUMBERS}
    held_out = np.repeat([_is_held_out(file) for file in files], list(map(len, tables)))
    index = columns["prompt_index"]
    return columns | {"held_out": held_out, "prompt_index": np.where(held_out, -1 - index, index)}


def rollout_files(folder: Path) -> list[Path]:
    """The rollout files of a run, those of training first, in the order of their names; none if it has none."""
    return [file for name in ("rollouts", _VALIDATION) for file in sorted((folder / name).glob("*.parquet"))]


def _is_held_out(file: Path) -> bool:
    return file.parent.name == _VALIDATION


def choose(columns: Mapping[str, Any], seed: int = 0, follow: Sequence[int] = ()) -> dict[int, list[str]]:
    """Chooses rollouts by their numbers.

    Args:
        columns: What `numbers` returned.
        seed: Seed of the stratified sample and of ties.
        follow: Prompt indices to follow first, such as those that other runs have, too.

    Returns:
        Row → why it was chosen (`best`, `worst`, `malformed`, `changed`, `sample`), the most wanted rows first.
    """
    rng = random.Random(seed)
    why: dict[int, list[str]] = {}
    training, is_ok = ~columns["held_out"], columns["status"] == "ok"
    well_formed = np.flatnonzero(training & is_ok)
    ranked = well_formed[np.argsort(columns["reward"][well_formed], kind="stable")].tolist()
    malformed = np.flatnonzero(training & ~is_ok).tolist()
    by_step = np.flatnonzero(training)
    by_step = by_step[np.argsort(columns["step"][by_step], kind="stable")]
    kinds: list[tuple[str, list[int]]] = [
        ("best", ranked[::-1][:_EXTREMES]),
        ("worst", ranked[:_EXTREMES]),
        ("changed", _followed(columns, follow)),
        ("malformed", _spread(malformed, columns["step"], _MALFORMED, rng)),
        ("sample", _spread(by_step.tolist(), columns["step"], min(len(by_step), _STRATIFIED), rng)),
    ]
    for kind, rows in kinds:
        for row in rows:
            why.setdefault(row, []).append(kind)
    return why


def _spread(rows: Sequence[int], steps: Any, count: int, rng: random.Random) -> list[int]:
    """Up to `count` rows, evenly over the steps: one of each step in turn, at random within a step."""
    by_step: dict[int, list[int]] = {}
    for row in rows:
        by_step.setdefault(int(steps[row]), []).append(row)
    for of_step in by_step.values():
        rng.shuffle(of_step)
    order = sorted(by_step)
    rng.shuffle(order)
    rounds = max(map(len, by_step.values()), default=0)
    picked = [by_step[step][i] for i in range(rounds) for step in order if i < len(by_step[step])]
    return picked[:count]


def _followed(columns: Mapping[str, Any], first: Sequence[int]) -> list[int]:
    """One sample a step of the prompts whose thoughts changed most between their first and their last step."""
    by_prompt: dict[int, dict[int, list[int]]] = {}
    for row, (prompt, step) in enumerate(zip(columns["prompt_index"].tolist(), columns["step"].tolist(), strict=True)):
        by_prompt.setdefault(prompt, {}).setdefault(step, []).append(row)
    length = columns["thought_tokens"] + columns["response_tokens"]

    def change(prompt: int) -> float:
        steps = by_prompt[prompt]
        ends = [float(length[steps[step]].mean()) for step in (min(steps), max(steps))]
        return abs(ends[1] - ends[0])

    repeated = sorted((p for p, steps in by_prompt.items() if len(steps) > 1), key=change, reverse=True)
    wanted = [prompt for prompt in first if prompt in by_prompt][: _FOLLOWED // 2]
    wanted += [prompt for prompt in repeated if prompt not in wanted][: _FOLLOWED - len(wanted)]
    rows = []
    for prompt in wanted:
        steps = sorted(by_prompt[prompt])
        at = {round(i * (len(steps) - 1) / (_FOLLOWED_STEPS - 1)) for i in range(_FOLLOWED_STEPS)}
        # The sample of median length stands for the step.
        rows += [sorted(of_step := by_prompt[prompt][steps[i]], key=lambda r: (length[r], r))[len(of_step) // 2]
                 for i in sorted(at)]  # fmt: skip
    return rows


def read_chosen(folder: Path, why: Mapping[int, list[str]], budget: int) -> Picked:
    """Reads the texts of chosen rollouts until a budget is spent.

    Args:
        folder: The run's folder.
        why: Row, counted over all files → why it was chosen, the most wanted rows first.
        budget: Bytes that the texts may take, each compressed for itself.

    Returns:
        The rollouts in the order of their steps, and their prompts.
    """
    records: dict[int, Row] = {}
    picked = Picked()
    for file in rollout_files(folder):  # one file at a time: the texts of a whole run may not fit into memory
        table = read_rollouts(file, [*NUMBERS, *TEXTS])
        inside = [row for row in why if picked.total <= row < picked.total + len(table)]
        if inside:
            rows = [
                row | {"held_out": _is_held_out(file)}
                for row in table.take([row - picked.total for row in inside]).to_pylist()
            ]
            records |= dict(zip(inside, rows, strict=True))
        picked.total += len(table)
    positions: dict[int, int] = {}
    for row, kinds in why.items():
        record = records[row]
        if record["held_out"]:
            record["prompt_index"] = -1 - record["prompt_index"]
        messages = [[message["role"], _shorten(message["content"])] for message in record.pop("messages")]
        thought, response = _parts(record)
        fresh = record["prompt_index"] not in positions
        budget -= _size([thought, response, *(m[1] for m in messages if fresh)])
        if budget < 0:
            break
        if fresh:
            positions[record["prompt_index"]] = len(picked.prompts)
            picked.prompts.append({"index": record["prompt_index"], "messages": messages})
        parts = {name: _round(value) for name, value in record.pop("reward_parts") if value is not None}
        record |= {"reward": _round(record["reward"]), "thought": thought, "response": response, "parts": parts}
        record |= {"prompt": positions[record.pop("prompt_index")], "kinds": kinds}
        picked.rows.append({key: value for key, value in record.items() if key not in ("text", "group", "rank")})
    picked.rows.sort(key=lambda row: (row["step"], row["prompt"], row["sample"]))
    return picked


def _parts(record: Row) -> tuple[str, str]:
    """Thought and response; a malformed completion has no response, so its text follows the thought."""
    thought, response, text = record["thought"], record["response"], record["text"]
    if record["status"] != "ok":
        response = text.partition(thought)[2] if thought else text
    return _shorten(thought), _shorten(response)


def _shorten(text: str) -> str:
    """Omits the middle of a text that is too long."""
    if len(text) <= MAX_CHARS:
        return text
    half = MAX_CHARS // 2
    return f"{text[:half]} […{len(text) - 2 * half:,} characters omitted…] {text[-half:]}"


def _size(texts: Iterable[str]) -> int:
    return len(zlib.compress("\n".join(texts).encode(), 1))


def _round(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


def shared_prompts(runs: Sequence[Mapping[str, Any]]) -> list[int]:
    """Prompt indices that occur in the rollouts of more than one run, in ascending order."""
    seen = [set(columns["prompt_index"].tolist()) for columns in runs]
    return sorted({p for i, a in enumerate(seen) for b in seen[i + 1 :] for p in a & b})
