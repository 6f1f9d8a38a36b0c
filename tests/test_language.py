"""The code, the configs and the documentation use the field's terms instead of the project's former vocabulary."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCANNED = ("src", "callbacks", "configs", "docs", "benchmarks", "scripts", "README.md", "Makefile", "Dockerfile")
SUFFIXES = {".py", ".yaml", ".md", ".sh", ".sbatch", ""}

FORMER_TERMS = {
    r"number formats?": "dtype",
    r"in shards": "sharded",
    r"(?:put|puts|putting) together": "all-gathered or unsharded",
    r"everyones|rlmt\.ranks|ranks\.(?:together|mistake|hook|gathered)": "the functions of rlmt.distributed.collectives",
    r"first_pass|first_values": "compute_logprobs, compute_values",
    r"teach(?:es)?[ _]nothing": "no learning signal",
    r"idle batch(?:es)?|keep[ _]steps?": "no-op micro-batch",
    r"told (?:once|aloud|with|of|by|in one line|on which)|(?:said|counted|says so) aloud": "reported, raised or logged",
    r"(?:is|are) told": "receives, or is reported",
    r"by and by|in vain|goes on where|anew": "gradually, without effect, resumes, again",
    r"Moment\b|rlmt\.resume|a moment's|the moment's": "Snapshot, rlmt.checkpointing",
    r"RunLog|SharedError|RanksPart": "ResumableCSVLogger, AllRanksUserError, RankState",
    r"rlmt\.(?:optim|sharding|records|plots|thinking|tokens|rng|budget|mini|tiny|batching)": "the new module path",
    r"torn (?:file|checkpoint|write)s?|half a checkpoint": "truncated",
    r"guests?": "isolation",
    r"what (?:is )?made of it|makes? of it|what becomes of": "a plain statement of the result",
    r"drawn? samples|samples? (?:is|are|was|were) drawn|draws? (?:rollouts|samples)": "sample, generate rollouts",
}
"""Regular expression of a former term → the term to use."""

EXCEPTIONS: set[str] = set()
"""`FILE: LINE TEXT` of accepted matches; it should stay empty."""


def text_files() -> Iterator[Path]:
    # rglob does not follow the links src/rlmt/callbacks and src/rlmt/configs.
    for name in SCANNED:
        path = ROOT / name
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in found if not any(part.endswith(".egg-info") for part in file.parts)]
        yield from (file for file in found if file.is_file() and file.suffix in SUFFIXES)


@pytest.mark.parametrize("term", FORMER_TERMS)
def test_former_terms_are_not_used(term: str) -> None:
    pattern = re.compile(rf"(?<![\w/]){term}(?!\w)")
    matches = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in text_files()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line) and f"{file.relative_to(ROOT)}: {line.strip()}" not in EXCEPTIONS
    ]
    assert not matches, f"use {FORMER_TERMS[term]} instead:\n" + "\n".join(matches)


def test_scan_reads_every_folder() -> None:
    scanned = {file.relative_to(ROOT).parts[0] for file in text_files()}
    assert scanned == set(SCANNED)
