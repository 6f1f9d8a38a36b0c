"""Thoughts and answers of a policy before and after RL, from the rollout files of its run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_COLUMNS = ["step", "prompt_index", "messages", "thought", "response", "status", "reward"]
_MOST_CHARS = 400


@dataclass(frozen=True)
class Sample:
    """What a policy wrote in a training step."""

    step: int
    """Rollout step, from 0; the samples of step 0 are from before any update."""
    prompt: str
    """The last message of the prompt."""
    thought: str
    response: str
    """The response, or the status of a malformed completion in brackets."""
    reward: float


def before_and_after(folder: Path, count: int = 3) -> list[tuple[Sample, Sample]]:
    """Pairs of an early and a late sample, for the same prompts as far as the run had them twice.

    Of a prompt's samples in a step the one with the median reward is taken, so that none is picked for its quality.

    Args:
        folder: Folder of a run with `rollouts/`.
        count: Number of pairs.

    Returns:
        At most `count` pairs; none without rollout files, or if they are all of one step.
    """
    files = sorted((folder / "rollouts").glob("*.parquet"))
    if not files:
        return []
    rows = pa.concat_tables([pq.read_table(file, columns=_COLUMNS) for file in files]).to_pylist()
    first, last = min(row["step"] for row in rows), max(row["step"] for row in rows)
    if first == last:
        return []
    steps: dict[int, set[int]] = {}
    for row in rows:
        steps.setdefault(row["prompt_index"], set()).add(row["step"])
    again = sorted(
        (index for index in steps if len(steps[index]) > 1), key=lambda i: (min(steps[i]) - max(steps[i]), i)
    )
    if len(again) >= count:
        return [(_median(rows, min(steps[i]), i), _median(rows, max(steps[i]), i)) for i in again[:count]]
    early, late = (sorted(i for i in steps if step in steps[i])[:count] for step in (first, last))
    return [(_median(rows, first, i), _median(rows, last, j)) for i, j in zip(early, late, strict=False)]


def sample_lines(pairs: Sequence[tuple[Sample, Sample]], title: str) -> Iterator[str]:
    """Markdown lines that show pairs of `before_and_after`.

    Args:
        pairs: The pairs.
        title: Name of the policy.
    """
    for before, after in pairs:
        same = before.prompt == after.prompt
        for sample, when in ((before, "before"), (after, "after")):
            if when == "before" or not same:
                yield f"> {_clip(sample.prompt)}"
            thought = f"[{_clip(sample.thought)}] " if sample.thought else ""
            when = f"{title} {when} RL" if sample.step == 0 or when == "after" else f"{title} in step {sample.step}"
            yield f"- {when} (reward {sample.reward:.2f}): {thought}**{_clip(sample.response)}**"


def _median(rows: Iterable[dict[str, Any]], step: int, index: int) -> Sample:
    """The sample with the median reward for a prompt in a step."""
    found = sorted((r for r in rows if (r["step"], r["prompt_index"]) == (step, index)), key=lambda r: r["reward"])
    row = found[len(found) // 2]
    response = row["response"] if row["status"] == "ok" else f"({row['status']})"
    return Sample(step, row["messages"][-1]["content"], row["thought"].strip(), response.strip(), row["reward"])


def _clip(text: str) -> str:
    """A text on one line, without its middle if it is long, in which Markdown has no effect."""
    text = " ".join(text.split())
    text = text if len(text) <= _MOST_CHARS else f"{text[: _MOST_CHARS // 2]} … {text[-_MOST_CHARS // 2 :]}"
    return "".join(f"\\{char}" if char in "\\`*_[]<>#|" else char for char in text)
