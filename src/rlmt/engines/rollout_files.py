"""Rollouts as parquet: one row a sample, with all that it takes to look at a run afterwards or to replay it."""

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
        ("step", pa.int64()),  # as in metrics.csv; the batch's number in predictions
        ("rank", pa.int32()),  # process that drew the sample
        ("epoch", pa.int64()),
        ("group", pa.int32()),  # which prompt of this rank's batch, 0..P-1
        ("sample", pa.int32()),  # which sample of the group, 0..G-1
        ("prompt_index", pa.int64()),  # row of the prompt set
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("engine_logprobs", pa.list_(pa.float32())),  # one for each completion id
        ("text", pa.string()),  # decoded completion
        ("thought", pa.string()),
        ("response", pa.string()),
        ("status", pa.string()),
        ("finish", pa.string()),
        ("truncated", pa.bool_()),
        ("thought_tokens", pa.int32()),
        ("response_tokens", pa.int32()),
        ("reward", pa.float32()),  # the total trained on
        ("reward_parts", pa.map_(pa.string(), pa.float32())),  # raw scores; NaN where not scored
        ("scored_text", pa.string()),  # exactly what the rewards saw; null where not scored
        ("weight_version", pa.int64()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("max_new_tokens", pa.int32()),
        ("stop", pa.list_(pa.string())),
        ("stop_token_ids", pa.list_(pa.int32())),
    ]
)
"""Columns of a rollout file. Rewards of any names fit one schema, so files of different runs can be concatenated."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def _text(text: str) -> str:
    """Parquet strings are UTF-8, which cannot hold lone surrogates: each becomes U+FFFD. All else is kept exactly."""
    return _SURROGATE.sub("\ufffd", text)


def rollout_table(
    experience: Experience, step: int, format: Mapping[str, Any] | None = None, rank: int = 0
) -> pa.Table:
    """One row a sample, in the batch's order: samples of a prompt lie side by side.

    Token ids, log-probs, scores and texts come back exactly, NUL characters included; only lone surrogates, which
    decoding never makes, are replaced by U+FFFD.

    Args:
        experience: B samples after scoring.
        step: Rollout step, counted from 0.
        format: Thinking format as a dict; kept as JSON in the schema's metadata under `rlmt`, as {"format": ...}.
        rank: Process that drew the samples.

    Returns:
        Table of B rows with the columns of `SCHEMA`.
    """
    rollouts, scores, sampling = experience.rollouts, experience.scores, experience.rollouts.sampling
    size, group_size = len(rollouts), rollouts.group_size
    prompt_of = [i // group_size for i in range(size)]
    epochs = rollouts.epochs or [rollouts.epoch] * len(rollouts.prompts)
    messages = [
        [{"role": _text(m["role"]), "content": _text(m["content"])} for m in prompt.messages]
        for prompt in rollouts.prompts
    ]
    logprobs = torch.split(rollouts.engine_logprobs.detach().float().cpu(), rollouts.lengths)
    parts = {_text(name): values.detach().float().tolist() for name, values in scores.parts.items()}
    columns: dict[str, list[Any]] = {
        "step": [step] * size,
        "rank": [rank] * size,
        "epoch": [epochs[p] for p in prompt_of],
        "group": experience.group.tolist(),
        "sample": [i % group_size for i in range(size)],
        "prompt_index": [rollouts.prompts[p].index for p in prompt_of],
        "messages": [messages[p] for p in prompt_of],
        "prompt_ids": [rollouts.prompt_ids[p] for p in prompt_of],
        "completion_ids": rollouts.completion_ids,
        "engine_logprobs": [values.numpy() for values in logprobs],
        "text": [_text(text) for text in experience.texts],
        "thought": [_text(split.thought) for split in experience.splits],
        "response": [_text(split.response) for split in experience.splits],
        "status": [split.status.value for split in experience.splits],
        "finish": [reason.value for reason in rollouts.finish],
        "truncated": experience.truncated.tolist(),
        "thought_tokens": experience.thought_tokens.tolist(),
        "response_tokens": experience.response_tokens.tolist(),
        "reward": scores.total.detach().float().tolist(),
        "reward_parts": [[(name, values[i]) for name, values in parts.items()] for i in range(size)],
        "scored_text": [None if text is None else _text(text) for text in scores.texts],
        "weight_version": [rollouts.weight_version] * size,
        "temperature": [sampling.temperature] * size,
        "top_p": [sampling.top_p] * size,
        "max_new_tokens": [sampling.max_new_tokens] * size,
        "stop": [[_text(stop) for stop in sampling.stop]] * size,
        "stop_token_ids": [list(sampling.stop_token_ids)] * size,
    }
    metadata = None if format is None else {b"rlmt": json.dumps({"format": dict(format)}).encode()}
    return pa.table(columns, schema=SCHEMA.with_metadata(metadata))


def interleave_ranks(tables: Sequence[pa.Table], prompts: int) -> pa.Table:
    """Rows of a batch of all ranks as one process has them.

    Args:
        tables: each rank's; rank r of N has every Nth prompt of the batch from r on.
        prompts: how many there are at most; those after them are repeated ones, for ranks to have equally many.

    Returns:
        One table; `rank` still tells which process drew a sample.
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
    """Reads a rollout file, or all of a folder's in the order of their names, which is that of their steps.

    Args:
        path: A parquet file, or the `rollouts` folder of a run.
        columns: Names of the columns wanted; None reads all.

    Returns:
        Table with columns of `SCHEMA`, and with the files' metadata.

    Raises:
        UserError: Nothing is there, a file is no rollout file, or files of different formats lie side by side.
    """
    path = Path(path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(
            f"no rollouts at {path}: give a parquet file that `rlmt predict` or SampleTable wrote, or a folder of them"
        )
    tables = [_read(file, columns) for file in files]
    for file, table in zip(files, tables, strict=True):
        if table.schema.metadata != tables[0].schema.metadata:
            raise UserError(
                f"{file} is in another format than {files[0].name}: put files of one run alone into a folder"
            )
    return pa.concat_tables(tables)


def _read(file: Path, columns: list[str] | None) -> pa.Table:
    # ParquetFile and not read_table: the latter takes folder names such as "a=b" for a partition and adds columns.
    try:
        with pq.ParquetFile(file) as reader:
            schema = reader.schema_arrow
            if not schema.equals(SCHEMA):
                raise UserError(f"{file} is not a file of rollouts: its columns are {', '.join(schema.names[:8])}, …")
            return reader.read(columns=columns)
    except pa.ArrowInvalid as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{file} is not a parquet file ({why}): give one that rlmt wrote") from error


def write_rollouts(table: pa.Table, path: Path) -> None:
    """Writes a rollout file, whole or not at all: readers never see half of one."""
    with atomic_write(path) as unfinished:
        pq.write_table(table, unfinished, compression="zstd")
