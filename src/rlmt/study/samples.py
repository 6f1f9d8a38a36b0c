"""Thoughts and answers of a study's arms to the same held-out prompts, from the rollout files of validations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_COLUMNS = ["step", "prompt_index", "messages", "thought", "response", "status", "reward"]
_MOST_CHARS = 400


@dataclass(frozen=True)
class Sample:
    """What a policy wrote in its last validation."""

    prompt: str
    """The last message of the prompt."""
    thought: str
    response: str
    """The response, or the status of a malformed completion in brackets."""
    reward: float


def answers_to_same_prompts(runs: Mapping[str, Path], count: int = 3) -> list[dict[str, Sample]]:
    """The answers of several policies to prompts that all of them had.

    The first prompts of the set are taken, and of several samples of one prompt the one with the median reward, so that
    none is picked for its quality.

    Args:
        runs: Label → folder of a run with `val_rollouts/`; a run without it is left out.
        count: Number of prompts.

    Returns:
        For each prompt label → sample.
    """
    found = {label: rows for label, folder in runs.items() if (rows := _last_validation(folder))}
    shared = sorted(set.intersection(*map(set, found.values()))) if found else []
    return [{label: _median(rows[index]) for label, rows in found.items()} for index in shared[:count]]


def sample_lines(answers: list[dict[str, Sample]]) -> Iterator[str]:
    """Markdown lines that show the answers, thoughts in brackets.

    Args:
        answers: What `answers_to_same_prompts` returned.
    """
    for by_label in answers:
        yield from ("", f"> {_clip(next(iter(by_label.values())).prompt)}", "")
        for label, sample in by_label.items():
            thought = f"[{_clip(sample.thought)}] " if sample.thought else ""
            yield f"- {label} (reward {sample.reward:.2f}): {thought}**{_clip(sample.response)}**"


def _last_validation(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Rows of a run's last validation by the row number of their prompt."""
    tables = [pq.read_table(file, columns=_COLUMNS) for file in sorted((folder / "val_rollouts").glob("*.parquet"))]
    rows = pa.concat_tables(tables).to_pylist() if tables else []
    last = max((row["step"] for row in rows), default=0)
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["step"] == last:
            found.setdefault(row["prompt_index"], []).append(row)
    return found


def _median(rows: list[dict[str, Any]]) -> Sample:
    """The sample with the median reward."""
    row = sorted(rows, key=lambda row: row["reward"])[len(rows) // 2]
    response = row["response"] if row["status"] == "ok" else f"({row['status']})"
    return Sample(row["messages"][-1]["content"], row["thought"].strip(), response.strip(), row["reward"])


def _clip(text: str) -> str:
    """A text on one line, without its middle if it is long, in which Markdown has no effect."""
    text = " ".join(text.split())
    text = text if len(text) <= _MOST_CHARS else f"{text[: _MOST_CHARS // 2]} … {text[-_MOST_CHARS // 2 :]}"
    return "".join(f"\\{char}" if char in "\\`*_[]<>#|" else char for char in text)
