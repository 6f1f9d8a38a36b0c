"""Sample tables for loggers that show text: TensorBoard and Weights & Biases."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger

KEY = "samples"
"""Name of the table in a logger."""
_MARKUP = re.compile(r"[^\w\s]", re.ASCII)
"""Characters that Markdown or HTML could read as markup."""


@dataclass(frozen=True)
class SampleRow:
    """One sample of a table; texts are shortened and without control characters."""

    reward: float
    status: str
    prompt: str
    thought: str
    response: str


def log_samples(loggers: Sequence[Logger], rows: Sequence[SampleRow], step: int) -> None:
    """Logs some samples to each logger that shows text; to others, such as the CSV logger, nothing.

    TensorBoard receives a Markdown table. A logger with Lightning's `log_text`, such as `WandbLogger`, receives a table
    with the step in its first column.

    Args:
        loggers: Loggers of the run.
        rows: Samples.
        step: Rollout step.
    """
    columns = list(SampleRow.__dataclass_fields__)
    for logger in loggers:
        log_text: Any = getattr(logger, "log_text", None)
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(KEY, markdown_table(columns, rows), step)
        elif log_text is not None:
            data = [[step, *(getattr(row, name) for name in columns)] for row in rows]
            log_text(KEY, columns=["step", *columns], data=data, step=step)


def markdown_table(columns: Sequence[str], rows: Sequence[SampleRow]) -> str:
    """A Markdown table that shows each text as it is, whatever markup is in it."""
    lines = [columns, ["---"] * len(columns)]
    lines += [[f"{row.reward:.3f}", *(_literal(getattr(row, name)) for name in columns[1:])] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _literal(text: str) -> str:
    """Text as a Markdown cell, with markup as character references and line breaks as HTML."""
    escaped = _MARKUP.sub(lambda match: f"&#{ord(match.group())};", text)
    return "<br>".join(escaped.splitlines())
