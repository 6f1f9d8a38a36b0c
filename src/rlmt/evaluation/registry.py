"""Benchmarks by name: those of rlmt, or a class of your own as MODULE.CLASS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module

from rlmt.errors import UserError, first_line
from rlmt.evaluation.benchmark import Benchmark, Item, Scoring
from rlmt.evaluation.benchmarks import BENCHMARKS


def find_benchmarks(names: Sequence[str], scoring: Scoring) -> list[Benchmark]:
    """The benchmarks of these names.

    Args:
        names: Names, or MODULE.CLASS of a subclass of `Benchmark`.
        scoring: Whose rules hold.

    Raises:
        UserError: There are none, one is unknown, or one occurs twice.
    """
    if not names:
        raise UserError(f"--benchmarks is not set; choose from {', '.join(BENCHMARKS)}.")
    found = [find_benchmark(name, scoring) for name in names]
    for benchmark in found:
        if sum(other.name == benchmark.name for other in found) > 1:
            raise UserError(f"--benchmarks: {benchmark.name} occurs twice; give each once.")
    return found


def find_benchmark(name: str, scoring: Scoring = "ours", option: str = "--benchmarks") -> Benchmark:
    """The benchmark of a name.

    Args:
        name: Name, or MODULE.CLASS of a subclass of `Benchmark`.
        scoring: Whose rules hold.
        option: Option of the name, for messages.

    Raises:
        UserError: It is unknown.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name](scoring)
    module, _, class_name = name.rpartition(".")
    if not module:
        raise UserError(
            f"{option} {name}: no such benchmark; choose from {', '.join(BENCHMARKS)}, or give MODULE.CLASS."
        )
    try:
        found = getattr(import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{option} {name}: cannot be imported ({first_line(error)}); check module and class."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Benchmark)):
        raise UserError(f"{option} {name}: is no subclass of rlmt.evaluation.benchmark.Benchmark; derive it from that.")
    return found(scoring)


def load_items(benchmarks: Sequence[Benchmark], data: Mapping[str, str], limit: int | None) -> list[list[Item]]:
    """Reads the items of each benchmark.

    Args:
        benchmarks: The benchmarks.
        data: File, folder or hub dataset by name of benchmark.
        limit: Number of items, from the first; None takes all.

    Raises:
        UserError: A name is unknown, or the data cannot be read.
    """
    names = [benchmark.name for benchmark in benchmarks]
    if unknown := [name for name in data if name not in BENCHMARKS and name not in names]:
        raise UserError(f"--data.{unknown[0]}: no such benchmark; choose from {', '.join(BENCHMARKS)}.")
    return [
        load_benchmark_items(benchmark, data.get(benchmark.name), f"--data.{benchmark.name}")[:limit]
        for benchmark in benchmarks
    ]


def load_benchmark_items(benchmark: Benchmark, path: str | None, option: str) -> list[Item]:
    """Reads the items of a benchmark.

    Args:
        benchmark: The benchmark.
        path: File, folder or hub dataset; None takes the benchmark's hub dataset.
        option: Option of the path, for messages.

    Raises:
        UserError: There is no path and no hub dataset, or the data cannot be read.
    """
    if path is None and benchmark.source.startswith(("http://", "https://")):
        raise UserError(
            f"{option} is not set: the data of {benchmark.title} is no hub dataset; download it from "
            f"{benchmark.source} and give the file or folder."
        )
    return benchmark.load(path or benchmark.source)
