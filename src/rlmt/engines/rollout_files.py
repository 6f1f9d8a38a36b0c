"""Rollout files in parquet: one row per sample, with everything needed to inspect a run later or to replay it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rlmt.checkpointing.files import atomic_write
from rlmt.errors import UserError
from rlmt.types import Experience

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # as in metrics.csv; the batch number in predictions
        ("rank", pa.int32()),  # rank that generated the sample
        ("epoch", pa.int64()),
        ("group", pa.int32()),  # prompt within this rank's batch, 0..P-1
        ("sample", pa.int32()),  # sample within the group, 0..G-1
        ("prompt_index", pa.int64()),  # row number in the prompt set
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("extra", pa.string()),  # other columns of the prompt's row as JSON; null without any
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("engine_logprobs", pa.list_(pa.float32())),  # one per completion id
        ("text", pa.string()),  # decoded completion
        ("thought", pa.string()),
        ("response", pa.string()),
        ("status", pa.string()),
        ("finish", pa.string()),
        ("truncated", pa.bool_()),
        ("thought_tokens", pa.int32()),
        ("response_tokens", pa.int32()),
        ("reward", pa.float32()),  # total reward used for training
        ("reward_parts", pa.map_(pa.string(), pa.float32())),  # raw scores; NaN where not scored
        ("scored_text", pa.string()),  # exact input of the rewards; null where not scored
        ("weight_version", pa.int64()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("max_new_tokens", pa.int32()),
        ("stop", pa.list_(pa.string())),
        ("stop_token_ids", pa.list_(pa.int32())),
    ]
)
"""Columns of a rollout file. The schema does not depend on reward names, so files of different runs concatenate."""

_WITHOUT_EXTRA = pa.schema([column for column in SCHEMA if column.name != "extra"])
"""Columns of files that rlmt 0.2 and earlier wrote."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def _replace_surrogates(text: str) -> str:
    """Replaces lone surrogates, which UTF-8 and so parquet cannot represent, by U+FFFD; changes nothing else."""
    return _SURROGATE.sub("\ufffd", text)


def rollout_table(
    experience: Experience, step: int, format: Mapping[str, Any] | None = None, rank: int = 0
) -> pa.Table:
    """Converts a scored batch to a table: one row per sample, in batch order, samples of a prompt adjacent.

    Token ids, log-probs, scores and texts are stored exactly, NUL characters included; only lone surrogates, which
    decoding never produces, are replaced by U+FFFD.

    Args:
        experience: B samples after scoring.
        step: Rollout step, from 0.
        format: Thinking format as a dict; stored as JSON in the schema's metadata under `rlmt`, as {"format": ...}.
        rank: Rank that generated the samples.

    Returns:
        Table of B rows with the columns of `SCHEMA`.
    """
    clean = _replace_surrogates
    rollouts, scores, sampling = experience.rollouts, experience.scores, experience.rollouts.sampling
    size, group_size = len(rollouts), rollouts.group_size
    prompt_of = [i // group_size for i in range(size)]
    epochs = rollouts.epochs or [rollouts.epoch] * len(rollouts.prompts)
    messages = [[{key: clean(m[key]) for key in ("role", "content")} for m in p.messages] for p in rollouts.prompts]
    extra = [clean(json.dumps(p.extra, ensure_ascii=False)) if p.extra else None for p in rollouts.prompts]
    logprobs = torch.split(rollouts.engine_logprobs.detach().float().cpu(), rollouts.lengths)
    parts = {clean(name): values.detach().float().tolist() for name, values in scores.parts.items()}
    columns: dict[str, list[Any]] = {
        "step": [step] * size,
        "rank": [rank] * size,
        "epoch": [epochs[p] for p in prompt_of],
        "group": experience.group.tolist(),
        "sample": [i % group_size for i in range(size)],
        "prompt_index": [rollouts.prompts[p].index for p in prompt_of],
        "messages": [messages[p] for p in prompt_of],
        "extra": [extra[p] for p in prompt_of],
        "prompt_ids": [rollouts.prompt_ids[p] for p in prompt_of],
        "completion_ids": rollouts.completion_ids,
        "engine_logprobs": [values.numpy() for values in logprobs],
        "text": [clean(text) for text in experience.texts],
        "thought": [clean(split.thought) for split in experience.splits],
        "response": [clean(split.response) for split in experience.splits],
        "status": [split.status.value for split in experience.splits],
        "finish": [reason.value for reason in rollouts.finish],
        "truncated": experience.truncated.tolist(),
        "thought_tokens": experience.thought_tokens.tolist(),
        "response_tokens": experience.response_tokens.tolist(),
        "reward": scores.total.detach().float().tolist(),
        "reward_parts": [[(name, values[i]) for name, values in parts.items()] for i in range(size)],
        "scored_text": [None if text is None else clean(text) for text in scores.texts],
        "weight_version": [rollouts.weight_version] * size,
        "temperature": [sampling.temperature] * size,
        "top_p": [sampling.top_p] * size,
        "max_new_tokens": [sampling.max_new_tokens] * size,
        "stop": [[clean(stop) for stop in sampling.stop]] * size,
        "stop_token_ids": [list(sampling.stop_token_ids)] * size,
    }
    metadata = None if format is None else {b"rlmt": json.dumps({"format": dict(format)}).encode()}
    return pa.table(columns, schema=SCHEMA.with_metadata(metadata))


def interleave_ranks(tables: Sequence[pa.Table], prompts: int) -> pa.Table:
    """Merges the tables of all ranks into the row order of a single process.

    Args:
        tables: One table per rank; rank r of N has every Nth prompt of the batch, starting with r.
        prompts: Maximum number of prompts; later ones are repetitions that give every rank equally many.

    Returns:
        One table; the column `rank` still holds the rank that generated each sample.
    """
    column = SCHEMA.get_field_index("group")
    parts = []
    for rank, table in enumerate(tables):
        groups = table["group"].to_numpy() * len(tables) + rank
        parts.append(table.set_column(column, SCHEMA.field(column), pa.array(groups, pa.int32())))
    rows = pa.concat_tables(parts)
    groups = rows["group"].to_numpy()
    order = groups.argsort(kind="stable")
    return rows.take(order[groups[order] < prompts])


def read_rollouts(path: str | Path, columns: list[str] | None = None) -> pa.Table:
    """Reads a rollout file, or all files of a folder in the order of their names, which is the order of steps.

    Args:
        path: A parquet file, or the `rollouts` folder of a run.
        columns: Names of the columns to read; None reads all.

    Returns:
        Table with columns of `SCHEMA`, and with the files' metadata.

    Raises:
        UserError: The path has no rollout files, a file is not a rollout file, or the files have different formats.
    """
    path = Path(path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(
            f"no rollouts at {path}: give a parquet file that `rlmt predict` or SampleTable wrote, or a folder of them."
        )
    tables = [_read(file, columns) for file in files]
    for file, table in zip(files, tables, strict=True):
        if table.schema.metadata != tables[0].schema.metadata:
            raise UserError(
                f"{file} has another format than {files[0].name}: a folder must hold the files of one run only."
            )
    return pa.concat_tables(tables)


def _read(file: Path, columns: list[str] | None) -> pa.Table:
    """Reads one rollout file."""
    # ParquetFile instead of read_table, which takes folder names such as "a=b" for partitions and adds columns.
    try:
        with pq.ParquetFile(file) as reader:
            schema = reader.schema_arrow
            if schema.equals(_WITHOUT_EXTRA):
                position = SCHEMA.get_field_index("extra")
                table = reader.read()
                table = table.add_column(position, SCHEMA.field("extra"), pa.nulls(len(table), pa.string()))
                return table if columns is None else table.select(columns)
            if not schema.equals(SCHEMA):
                names = ", ".join(schema.names[:8])
                raise UserError(f"{file} is not a rollout file (columns: {names}, …): give one that rlmt wrote.")
            return reader.read(columns=columns)
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{file} is not a parquet file ({reason}): give one that rlmt wrote.") from error


def write_rollouts(table: pa.Table, path: Path) -> None:
    """Writes a rollout file atomically: readers never see a truncated one."""
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
