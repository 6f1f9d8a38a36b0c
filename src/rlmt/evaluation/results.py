"""Results on disk: one JSON file for each benchmark, model and scoring, with the scores and the resamples beside it.

    OUT/ledger.jsonl                                 answers of judges
    OUT/<benchmark>/items.jsonl                      items
    OUT/<benchmark>/<model>/completions/             completions (parquet), and what they were generated with
    OUT/<benchmark>/<model>/<scoring>.json           figures with intervals, counts, judge, baseline, settings
    OUT/<benchmark>/<model>/<scoring>.scores.parquet     one score per item
    OUT/<benchmark>/<model>/<scoring>.resamples.parquet  each figure of each bootstrap resample

Resamples of two models on the same items are paired: resample k has the same items. So a table computes intervals of
differences and averages from these files alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlmt.checkpointing.files import atomic_write
from rlmt.checkpointing.provenance import source_commit, versions
from rlmt.data.sampler import item_seed
from rlmt.errors import UserError, first_line
from rlmt.evaluation.benchmark import Benchmark, Item
from rlmt.evaluation.completions import Completion, prompt_hash, read_settings
from rlmt.evaluation.scoring import Scored
from rlmt.evaluation.statistics import SLOW_RESAMPLES, Floats, interval, resample

ITEMS = "items.jsonl"
COMPLETIONS = "completions"


def write_items(folder: Path, items: Sequence[Item]) -> None:
    """Writes the items of a benchmark, which scoring reads, so that another machine needs no other data.

    Args:
        folder: Folder of the benchmark.
        items: The items.
    """
    with atomic_write(folder / ITEMS) as file:
        file.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items), encoding="utf-8")


def read_items(folder: Path) -> list[Item]:
    """Reads the items of a benchmark.

    Raises:
        UserError: They are missing or damaged.
    """
    try:
        text = (folder / ITEMS).read_text(encoding="utf-8")
        return [Item(**json.loads(line)) for line in text.split("\n") if line]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder / ITEMS}: cannot be read ({first_line(error)}); generate completions with --out {folder.parent}."
        ) from error


def write_result(
    folder: Path, benchmark: Benchmark, completions: Sequence[Completion], scored: Scored
) -> dict[str, Any]:
    """Computes the figures with their intervals, and writes them.

    Args:
        folder: Folder of the model within that of the benchmark.
        benchmark: The benchmark.
        completions: One completion per item.
        scored: Their scores.

    Returns:
        What the JSON file holds.
    """
    rows, name = scored.rows, benchmark.scoring
    groups = [row.item.group or row.item.id for row in rows]
    seed = item_seed(0, benchmark.name)  # resamples of different benchmarks are independent
    values, samples = resample(
        lambda numbers: list(benchmark.compute([rows[i] for i in numbers]).values()), groups, seed=seed
    )
    figures = {
        figure: interval(float(value), column, len(set(groups))).to_json()
        for figure, value, column in zip(benchmark.figures, values, samples.T, strict=True)
    }
    settings = read_settings(folder / COMPLETIONS)
    result = {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "model": folder.name,
        "source": settings["source"],
        "format": settings["format"]["name"],
        "scoring": name,
        "figures": figures,
        "chat": benchmark.chat,
        "n": len(rows),
        "groups": len(set(groups)),
        "malformed": sum(row.malformed for row in rows),
        "unparsed": sum(not row.score.parsed for row in rows),
        "finish": dict(Counter(completion.finish for completion in completions)),
        "thought_tokens": _mean([completion.thought_tokens for completion in completions]),
        "response_tokens": _mean([completion.response_tokens for completion in completions]),
        "judge": scored.judge,
        "judge_versions": list(scored.judge_versions),
        "paper_judge": benchmark.judge,
        "baseline": benchmark.baseline,
        "items": _hash_of([row.item for row in rows]),
        "generation": settings,
        "versions": versions(),
        "commit": source_commit(),
        "resamples": SLOW_RESAMPLES,
        "resampling_seed": seed,
    }
    _write_tables(folder, name, scored, dict(zip(benchmark.figures, samples.T, strict=True)))
    with atomic_write(folder / f"{name}.json") as file:  # last: a result is complete if it exists
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _write_tables(folder: Path, name: str, scored: Scored, samples: Mapping[str, Floats]) -> None:
    scores = [
        {
            "id": row.item.id,
            "group": row.item.group or row.item.id,
            "value": row.score.value,
            "weight": row.score.weight,
            "parsed": row.score.parsed,
            "malformed": row.malformed,
        }
        for row in scored.rows
    ]
    with atomic_write(folder / f"{name}.scores.parquet") as file:
        pq.write_table(pa.Table.from_pylist(scores), file)
    with atomic_write(folder / f"{name}.resamples.parquet") as file:
        pq.write_table(pa.table(dict(samples)), file)


def read_results(out: Path, scoring: str) -> list[dict[str, Any]]:
    """Reads all results of one scoring.

    Raises:
        UserError: There are none, one is damaged, or a benchmark has results of one model as `ours` and of another as
            `authors` only, which no column may mix.
    """
    other = "authors" if scoring == "ours" else "ours"
    found = []
    for folder in sorted({path.parent for name in (scoring, other) for path in out.glob(f"*/*/{name}.json")}):
        path = folder / f"{scoring}.json"
        if not path.is_file():
            if list(folder.parent.glob(f"*/{scoring}.json")):
                raise UserError(
                    f"{folder}: is scored as {other} only, and other models as {scoring}; one column never mixes them: "
                    f"run --judge_only --scoring {scoring} for {folder.name}."
                )
            continue
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({first_line(error)}); remove it, and evaluate again.") from error
    if not found:
        raise UserError(f"{out}: holds no results with scoring {scoring}; run `rlmt evaluate MODEL --out {out}` first.")
    return found


def read_resamples(out: Path, result: Mapping[str, Any]) -> Floats:
    """The resamples of a result's first figure, [resamples].

    Raises:
        UserError: The file is missing or damaged.
    """
    path = out / result["benchmark"] / result["model"] / f"{result['scoring']}.resamples.parquet"
    try:
        column: Floats = pq.read_table(path).column(0).to_numpy()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); run --judge_only again.") from error
    return column


def _mean(values: Sequence[int | None]) -> float | None:
    """The mean; None where a value is not known."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _hash_of(items: Sequence[Item]) -> str:
    """A hash of ids and prompts."""
    rows = sorted((item.id, item.group, prompt_hash(item)) for item in items)
    return blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()
